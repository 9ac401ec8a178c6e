"""On a GPU: one digest with any number of workers, through kills, whatever carries gradients."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu import ours
from tests.elastic.harness import SMALL, Undisturbed, as_arguments, kill, started, training
from tests.elastic.test_kill import assert_same_bits
from tests.elastic.test_puzzles import FLAGS as PUZZLES
from tests.elastic.test_puzzles import write_folder
from trm_dist.checkpoint.snapshot import Flat, pin, unflatten
from trm_dist.model.optim import Optimizer
from trm_dist.train import pin_numerics

GPU = {"--device": "cuda", "--dim": "64", "--epochs": "3"}
RUNS = {
    "mlp": {},
    "attn": {"--net": "attn", "--heads": "2"},
    "bf16": {"--precision": "bf16"},
    "bf16-attn": {"--net": "attn", "--heads": "2", "--precision": "bf16"},
    "compiled": {"--compile": ""},
    "compiled bf16-attn": {"--compile": "", "--net": "attn", "--heads": "2", "--precision": "bf16"},
    "softmax, adam-atan2": {"--loss": "softmax", "--optim": "adam-atan2", "--clip": "0"},
}


def alone(directory: Path, flags: dict[str, str], base: dict[str, str] = SMALL) -> Undisturbed:
    kernels = {"TORCHINDUCTOR_CACHE_DIR": str(directory.with_name("kernels"))}  # compiled anew
    with training(directory, flags=flags, base=base, variables=kernels) as run:
        assert run.end() == 0, run.messages()
        return Undisturbed(run.losses(), run.digest())


@pytest.mark.parametrize("name", RUNS)
def test_one_digest_with_one_and_more_workers_through_a_kill(tmp_path: Path, name: str) -> None:
    flags = GPU | RUNS[name]
    expected = alone(tmp_path / "alone", flags)
    workers = 2 if name == "mlp" else 3
    with training(tmp_path / "run", flags=flags, launch=workers) as run:
        run.wait_for_batches(9)
        kill(run.named("trm worker 1"))
        run.wait_for_start(2)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], expected)


def test_vectors_of_puzzles_have_one_digest(tmp_path: Path) -> None:
    flags = PUZZLES | {"--dataset": write_folder(tmp_path / "maze"), "--device": "cuda"}
    expected = alone(tmp_path / "alone", flags, base={})
    with training(tmp_path / "two", base={}, flags=flags, launch=2) as run:
        run.wait_for_batches(7)
        kill(run.named("trm worker 0"))
        assert run.end() == 0, run.messages()
        assert_same_bits([run], expected)


@pytest.mark.parametrize("workers", [2, 3])
def test_nccl_carries_the_same_bits_through_the_loss_of_a_worker(
    tmp_path: Path, workers: int
) -> None:
    expected = alone(tmp_path / "alone", GPU)
    wanted = SMALL | GPU | {"--backend": "nccl", "--checkpoint-dir": str(tmp_path / "run")}
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}",
        "--max-restarts=3", "-m", "tests.gpu.own_host", "train", *as_arguments(wanted),
    ]  # fmt: skip
    with started(tmp_path / "run", command) as run:
        run.wait_for_batches(9)
        kill(run.worker(1))
        run.wait_for_start(2)
        run.wait_for_batches(5)
        kill(run.worker(0))
        assert run.end() == 0, run.messages()
        assert_same_bits([run], expected)


def test_nccl_on_a_shared_gpu_is_refused(directory: Path) -> None:
    with training(directory, flags=GPU | {"--backend": "nccl"}, workers=2) as run:
        assert run.end() != 0
        assert run.errors.read_text().count("workers 0 and 1 share a GPU") == 1


def test_a_signal_saves_and_a_processor_goes_on(directory: Path) -> None:
    flags = GPU | {"--epochs": "40"}
    with training(directory, flags=flags, workers=2) as run:
        run.wait_for_batches(12)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() != 0
        told = run.told()
    with training(directory, flags=flags | {"--device": "cpu", "--epochs": "15"}) as run:
        assert run.end() == 0, run.messages()
        assert run.events("started")[0]["batch_count"] >= told
        assert "device is cpu here and was" in run.messages()


def test_the_first_losses_are_those_of_a_processor(tmp_path: Path) -> None:
    ours = alone(tmp_path / "gpu", GPU | {"--epochs": "1"})
    theirs = alone(tmp_path / "cpu", GPU | {"--epochs": "1", "--device": "cpu"})
    for batch in range(1, 4):
        (one,), (other,) = ours.losses[batch], theirs.losses[batch]
        assert float.fromhex(one) == pytest.approx(float.fromhex(other), rel=1e-4)
    assert ours.digest != theirs.digest


# The first product of autograd's own thread warns.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_a_recorded_step_has_the_bits_of_the_eager_one() -> None:
    pin_numerics(1)
    found = []
    for is_recorded in (False, True):
        step, state = ours(64, "fp32", is_recorded=is_recorded)
        for _ in range(3):
            step()
        tensors = [each.cpu() for _, each in sorted(state()["ema"]["weights"].items())]
        found.append(tensors)
    assert all(map(torch.equal, *found))


def test_the_norm_of_gradients_is_the_same_wherever_they_lie() -> None:
    module = torch.nn.Linear(64, 384, bias=False, device="cuda")
    optimizer = Optimizer(module, lr=0.0, warmup_steps=0, weight_decay=0.0, clip=0.0)
    buffer = torch.empty(module.weight.numel() + 2, device="cuda")
    for seed in range(100):  # one rounding in about ten shows the order
        gradient = torch.randn(384, 64, generator=torch.Generator().manual_seed(seed))
        norms = []
        for offset in (0, 2):
            module.weight.grad = buffer[offset:][: gradient.numel()].view_as(gradient)
            module.weight.grad.copy_(gradient)
            norms.append(optimizer.clip())
        assert torch.equal(*norms)


def test_snapshot_of_gpu_and_host_tensors_in_pinned_memory() -> None:
    tree = {"far": torch.randn(1000, 777, device="cuda"), "near": torch.arange(5), "three": 3}
    flat = Flat(tree)
    buffer = memoryview(bytearray(flat.num_bytes))
    pin(buffer)
    assert torch.frombuffer(buffer, dtype=torch.uint8).is_pinned()
    tree["far"] *= 2  # queued; the copy comes after it
    flat.copy_to(buffer)
    expected = tree["far"].cpu()
    tree["far"].zero_()
    found = unflatten(flat.header, buffer)
    assert torch.equal(found["far"], expected)
    assert torch.equal(found["near"], tree["near"])
    assert found["three"] == 3


def test_memory_that_cannot_be_pinned_is_told_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = memoryview(bytearray(1 << 20))
    pin(buffer)
    pin(buffer)  # CUDA refuses a second time
    assert "cannot be pinned" in caplog.text
    assert torch.ones(3, device="cuda").sum().item() == 3.0
