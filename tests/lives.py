"""Starts of a writer, lived second by second, and the directory that they leave."""

import os
from pathlib import Path

from tests.fakes import make_bytes
from trm_dist import events
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.observe.goodput import Start, parse
from trm_dist.observe.ledger import Ledger, Spent
from trm_dist.progress import Progress

RUN = {"run_id": "run-1", "branch": 1, "generation": 1, "created_at": 100.0}


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class Life:
    """One start of a writer, second by second."""

    def __init__(
        self, started_at: float, launched_at: float | None = None, cause: str = ""
    ) -> None:
        self.started_at = started_at
        self.clock = Clock(started_at)
        self.descriptor = os.memfd_create("ledger")
        self.ledger = Ledger(
            self.descriptor, started_at=started_at,
            launched_at=started_at if launched_at is None else launched_at,
            cause=cause, clock=self.clock,
        )  # fmt: skip
        self.ledger.belong(RUN)

    def spend(self, spent: Spent, seconds: float) -> None:
        self.ledger.spend(spent)
        self.clock.at += seconds
        self.ledger.spend(spent)

    def train_from(self, batch_count: int, world_size: int = 1) -> None:
        self.batch_count = batch_count
        self.ledger(
            events.Started(
                progress=Progress(batch_count=batch_count), source="", world_size=world_size,
                settings={"lr": "0.1 (given)"}, num_parameters=1, num_samples=1, notes={},
                batches_per_epoch=10, total_batches=10,
            )
        )  # fmt: skip

    def batch(self, seconds: float, loss: float = 1.0, num_samples: int = 4) -> None:
        self.spend(Spent.PRODUCTIVE, seconds)
        self.ledger.spend(Spent.SAVE_STALL)
        self.batch_count += 1
        self.ledger(
            events.Batch(
                progress=Progress(batch_count=self.batch_count), loss=loss, token_accuracy=0.5,
                exact_accuracy=0.25, mean_steps=1.0, lr=0.1, num_samples=num_samples,
                seconds=seconds,
            )
        )  # fmt: skip

    def read(self) -> bytes:
        return os.pread(self.descriptor, 1 << 20, 0)

    def start(self) -> Start:
        found = parse(self.read())
        assert found is not None
        return found

    def finish(self, digest: str = "d" * 64) -> None:
        self.ledger(
            events.Finished(
                progress=Progress(batch_count=self.batch_count), digest=digest, seconds=1,
                samples_per_s=1, peak_memory_bytes=1,
            )
        )  # fmt: skip
        self.ledger.end()

    def evaluate(self, exact_accuracy: float) -> None:
        self.ledger(
            events.Evaluated(
                progress=Progress(batch_count=self.batch_count), token_accuracy=0.9,
                exact_accuracy=exact_accuracy, mean_steps=1, num_samples=1, seconds=1,
            )
        )  # fmt: skip

    def leave_in(self, directory: Path) -> None:
        """Leave the ledger where the persister would."""
        hidden = directory / ".trm_dist"
        hidden.mkdir(parents=True, exist_ok=True)
        name = f"ledger-{int(self.started_at * 1000):014d}-0.jsonl"
        (hidden / name).write_bytes(self.read())


def troubled_run(directory: Path) -> None:
    """Leave a run of ten batches: killed at 4, stopped at 7, and finished with other workers."""
    first = Life(100.0)
    first.spend(Spent.STARTUP, 3)
    first.train_from(0, world_size=2)
    for count in range(4):
        first.batch(2, loss=4.0 - count)
    first.spend(Spent.PRODUCTIVE, 1)
    second = Life(115.0, launched_at=100.0, cause="worker 1: killed by SIGKILL")
    second.train_from(4, world_size=2)
    for _ in range(3):
        second.batch(2, loss=0.5)
    second.ledger.stop("SIGTERM")
    second.ledger.end()
    third = Life(130.0, launched_at=129.0)
    third.train_from(7, world_size=3)
    for _ in range(3):
        third.batch(2, loss=0.25)
    third.spend(Spent.EVALUATION, 2)
    third.evaluate(0.75)
    third.finish()
    for each in (first, second, third):
        each.leave_in(directory)
    for batch_count, name in ((5, epoch_name(1, 5)), (10, FINAL), (10, LATEST)):
        (directory / name).write_bytes(make_bytes(batch_count))
