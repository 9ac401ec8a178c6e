PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train demo test test-unit test-elastic test-s3 soak bench bench-quick bench-checkpoints bench-step bench-gpu bench-reduction bench-recovery lint type layers check test-k8s test-image test-gpu scan

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trm_dist needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Its 200 puzzles are for a test; what it needs to run is not.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gymnasium-sudoku==0.3.5
	touch $(READY)

# The main job: TRM on 4x4 Sudoku with two workers. Ctrl+C, then `make train` again, goes on.
train: $(READY)
	$(BIN)/torchrun --standalone --nproc_per_node=2 --max-restarts=20 -m trm_dist train \
	    --dataset 'sudoku4:train?count=40000' --eval-dataset 'sudoku4:test?count=1000' \
	    --checkpoint-dir checkpoints --checkpoint-interval 50 --eval-interval 50 \
	    --dim 64 --expansion 2 --h-cycles 2 --l-cycles 2 --n-sup 3 \
	    --batch-size 128 --shards 2 --epochs 1 --lr 5e-3 --warmup-steps 50

# A run undisturbed, the same run under chaos, both digests, a report and a picture (5 minutes).
demo: $(READY)
	$(BIN)/python -m tests.demo

# Two files at a time: most tests wait for processes to start.
test: $(READY)
	$(BIN)/python -m pytest -m 'not soak and not image and not gpu' -n 2 --dist loadfile

test-unit: $(READY)
	$(BIN)/python -m pytest tests/unit

test-elastic: $(READY)
	$(BIN)/python -m pytest tests/elastic -m 'not soak'

test-s3: $(READY)
	$(BIN)/python -m pytest tests/s3

test-k8s: $(READY)
	$(BIN)/python -m pytest tests/k8s -m 'not image'

# On a machine with a GPU; one is enough.
test-gpu: $(READY)
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and f"torch {torch.__version__} finds no GPU here, so every test would be skipped")'
	$(BIN)/python -m pytest tests/gpu

# Builds the image and runs the manifests in containers: root, and apt-get install buildah
# debootstrap podman runc netavark iptables catatonit.
test-image: $(READY)
	tests/k8s/build_image.sh
	$(BIN)/python -m pytest -m image

# The manifests in the eyes of checkov, which has many dependencies, so it gets a place of its own.
scan: .venv-scan/.ready
	.venv-scan/bin/checkov --quiet --compact --skip-download --framework kubernetes \
	    --file k8s/job.yaml
	.venv-scan/bin/checkov --quiet --compact --skip-download --framework dockerfile \
	    --file docker/Dockerfile

.venv-scan/.ready: $(READY)
	$(PYTHON) -m venv .venv-scan
	.venv-scan/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30
	touch .venv-scan/.ready

# One table against every peer, into build/bench: text, JSON, a picture. Nothing else may compute
# meanwhile. ARGS="--quick --only stop s3" measures some parts again; --help says more.
bench: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks $(ARGS)

# The same with fewer sizes and rounds (a quarter of an hour).
bench-quick: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks --quick $(ARGS)

# What saving and resuming cost, beside torch.save, DCP, Lightning and raw transfers.
bench-checkpoints: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks.saving stop
	.venv-bench/bin/python -m tests.benchmarks.saving throughput
	.venv-bench/bin/torchrun --nproc_per_node=2 -m tests.benchmarks.saving throughput
	.venv-bench/bin/python -m tests.benchmarks.loading resume
	.venv-bench/bin/python -m tests.benchmarks.loading s3

# Samples a second of a training step, beside tiny-recursive-model and plain code.
bench-step: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks.step
	.venv-bench/bin/torchrun --nproc_per_node=2 -m tests.benchmarks.step
	.venv-bench/bin/python -m tests.benchmarks.step --size quick --compiled

# A step, a snapshot and a restart on a GPU, beside the same, compiled and not.
bench-gpu: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks.gpu

# What the fixed order of sums costs, beside native DDP, with 1 to 5 workers.
bench-reduction: $(READY)
	$(BIN)/python -m tests.benchmarks.reduction
	for workers in 2 3 4 5; do \
	    $(BIN)/torchrun --nproc_per_node=$$workers -m tests.benchmarks.reduction || exit 1; \
	done

# Time from kill -9 to the next batch, batches lost, and goodput, beside the tutorials and Lightning.
bench-recovery: .venv-bench/.ready
	.venv-bench/bin/python -m tests.benchmarks.recovery time
	.venv-bench/bin/python -m tests.benchmarks.recovery lost
	.venv-bench/bin/python -m tests.benchmarks.recovery goodput

# The peers, in a place of their own.
.venv-bench/.ready: pyproject.toml constraints.txt tests/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[dev]' -r tests/benchmarks/peers.txt
	touch .venv-bench/.ready

# Fifty finished runs, and the other tests that take long.
soak: $(READY)
	$(BIN)/python -m pytest -m soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports --no-logo

check: lint type layers test
