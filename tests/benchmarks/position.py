"""How long a resume in the middle of a long epoch takes, command to first finished batch.

    python -m tests.benchmarks.position [--size full|quick|tiny]

One worker, batches of two, an epoch of more than a million of them. Each run trains ten batches and
saves; the counters in its checkpoint are then moved to batch 1,000,000, and the same command goes
on from there. Beside it, `position_peers`: a DataLoader whose first batches are skipped (of which
some are skipped and the time of all is extrapolated), the same by accelerate, which asks the
sampler only, and Lightning with torchdata's StatefulDataLoader. The peers' rows cost next to
nothing to make. What is not installed takes no part.
"""

import importlib.util
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.position_peers import BATCH_SIZE, FIRST, move
from tests.benchmarks.table import Goal, Row, end_in_order, parser, publish
from tests.elastic.harness import SNAPSHOTS, started
from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.state import from_bytes, sealed

FLAGS = [
    "--batch-size", "2", "--shards", "1", "--dim", "16", "--n-sup", "1",
    "--h-cycles", "2", "--l-cycles", "1", "--epochs", "1", "--log-format", "json", "--spot", "none",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Where a run goes on, how many batches a loader skips for real, and how often."""

    batch: int
    skipped: int
    rounds: int


PLANS = {
    "full": Plan(1_000_000, skipped=100_000, rounds=5),
    "quick": Plan(1_000_000, skipped=50_000, rounds=1),
    "tiny": Plan(1_000, skipped=100, rounds=1),
}


def measure(plan: Plan) -> Row:
    """Measure all ways, in turns."""
    with tempfile.TemporaryDirectory(prefix="position-") as work:
        ways = _ways(Path(work), plan)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(plan.rounds):
            for name, way in ways.items():
                took[name].append(way())
            print(f"round {number + 1} of {plan.rounds}", file=sys.stderr)
    return Row(
        subject="resume, command to first finished batch",
        what=f"at batch {plan.batch:,} of an epoch, 1 worker", unit="s", better="less",
        ours=took.pop("ours"), limit={NEAR: took.pop(NEAR)}, peers=took, goal=Goal(1.1, NEAR),
    )  # fmt: skip


NEAR = f"ours at batch {FIRST}"


def _ways(work: Path, plan: Plan) -> dict[str, Callable[[], float]]:
    ours = Ours(work / "ours", plan.batch)
    found = {"ours": lambda: ours.resume("far"), NEAR: lambda: ours.resume("near")}
    skipping = f"DataLoader, skipping (extrapolated from {plan.skipped:,})"
    peers = {
        "skip": (skipping, "torch"),
        "accelerate": ("accelerate's skip_first_batches", "accelerate"),
        "lightning": ("Lightning, StatefulDataLoader", "torchdata"),
    }
    for way, (name, package) in peers.items():
        if importlib.util.find_spec(package):
            found[name] = Peer(work / way, way, plan).resume
    return found


class Ours:
    """A run near the beginning of its epoch, and the same far from it."""

    def __init__(self, work: Path, batch: int) -> None:
        work.mkdir()
        self._work = work
        data = _grids(work / "data", BATCH_SIZE * batch + 100)
        self._command = [
            sys.executable, "-m", "trm_dist", "train", *FLAGS, "--dataset", str(data),
            "--cache-dir", str(work / "cache"), "--snapshot-dir", SNAPSHOTS,
            "--checkpoint-interval", str(FIRST),
        ]  # fmt: skip
        run = work / "first" / "run"
        run.parent.mkdir()
        with started(run, [*self._command, "--checkpoint-dir", str(run)]) as training:
            training.wait_for(lambda: list(run.glob(f"*_batch_{FIRST}.pt")), "a checkpoint")
            training.process.send_signal(signal.SIGTERM)
            training.end()
        state = from_bytes((next(run.glob(f"*_batch_{FIRST}.pt"))).read_bytes())
        for checkpoint in run.glob("*.pt"):
            checkpoint.unlink()
        self._states = {"near": state, "far": state | move(_counters(state), batch)}
        self._record = run

    def resume(self, where: str) -> float:
        """Return the seconds from the command to the first finished batch."""
        with tempfile.TemporaryDirectory(dir=self._work) as directory:
            run = Path(directory) / "run"
            shutil.copytree(self._record, run)
            (run / LATEST).write_bytes(b"".join(sealed(self._states[where])))
            own = ["--checkpoint-dir", str(run), "--resume", str(run / LATEST)]
            return _first_batch([*self._command, *own], run, self._states[where]["batch_count"])


def _grids(folder: Path, count: int) -> Path:
    """Write a folder of grids, which are encoded quickly."""
    folder.mkdir()
    sizes = {"vocab_size": 4, "seq_len": 16, "num_puzzle_identifiers": 1}
    (folder / "dataset.json").write_text(json.dumps(sizes))
    for name in ("inputs", "labels"):
        np.save(folder / f"all__{name}.npy", np.ones((count, 16), np.uint8))
    return folder


def _counters(state: dict[str, object]) -> dict[str, object]:
    names = ("batch_idx", "batch_count", "global_step", "samples_seen")
    return {name: state[name] for name in names}


class Peer:
    """A training of `position_peers` that has saved, far from the beginning of its epoch."""

    def __init__(self, work: Path, way: str, plan: Plan) -> None:
        work.mkdir()
        self._work, self._batch = work, plan.batch
        self._saved = work / "saved"
        self._saved.mkdir()
        self._arguments = [way, str(plan.batch), str(plan.skipped)]
        with started(self._saved, self._command("save", self._saved)) as training:
            assert training.end() == 0, training.messages()

    def resume(self) -> float:
        """Return the seconds from the command to the first batch, with what was not skipped."""
        with tempfile.TemporaryDirectory(dir=self._work) as directory:
            run = Path(directory) / "run"
            shutil.copytree(self._saved, run, symlinks=True)
            return _first_batch(self._command("resume", run), run, self._batch)

    def _command(self, what: str, directory: Path) -> list[str]:
        module = [sys.executable, "-m", "tests.benchmarks.position_peers"]
        return [*module, what, str(directory), *self._arguments]


def _first_batch(command: list[str], run: Path, batch: int) -> float:
    began_s = time.time()
    with started(run, command) as training:
        training.wait_for_batches(1)
        first = training.events("batch")[0]
        assert first["batch_count"] == batch + 1, first
        return first["time"] - began_s + first.get("not_skipped_s", 0.0)


if __name__ == "__main__":
    asked = parser(__doc__).parse_args()
    end_in_order()
    publish([measure(PLANS[asked.size])], asked.rows)
