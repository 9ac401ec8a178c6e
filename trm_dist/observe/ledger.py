"""What each second of a run is spent on, written down as it passes.

Each start of the writer keeps a ledger of its own: lines of JSON in memory that outlives it, of
which the persister keeps a copy next to the checkpoints. The last line is the present. It is
written over at every step, so that a SIGKILL costs the ledger no more than the step in progress.

The seconds add up to the wall time by construction: there is always one thing that time is spent
on, and entering the next one ends it. `goodput` reads what is written here.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trm_dist import events
from trm_dist.events import Event

VERSION = 1

LEAST_SPAN_S = 1.0
SPANS = 600
"""A line covers at least this part of the run's age, so a long run has few lines and all its ends
are as fine as its beginning was."""


_MEANS = ("loss", "token_accuracy", "exact_accuracy")

FINISHED = "finished"
"""The reason of a start that has come to the end of the run."""


class Spent(StrEnum):
    """What time is spent on."""

    PRODUCTIVE = "productive"
    """Training of batches that are part of the run's newest state."""
    STARTUP = "startup"
    """From the start of the process: imports, planning, data."""
    RENDEZVOUS = "rendezvous"
    """Until all workers have formed their group."""
    RESTORE = "restore"
    """Reading the newest state, building the model, and giving it to all workers."""
    DATA_WAIT = "data_wait"
    SAVE_STALL = "save_stall"
    """Training stands still for a copy or for the store."""
    EVALUATION = "evaluation"
    LOST_WORK = "lost_work"
    """Training whose result was lost: an unfinished batch, batches that were trained again."""
    DOWN = "down"
    """Nobody was there."""


_OF_A_START: list[Spent] = [each for each in Spent if each not in {Spent.LOST_WORK, Spent.DOWN}]
"""What a start can know of itself."""


@dataclass(slots=True)
class _Line:
    """The span that is the present."""

    since: float
    first: int
    """Batches of the run that were complete at its beginning."""
    seconds: dict[str, float] = field(default_factory=dict)
    unfinished: float = 0.0
    """Productive time since the last batch was complete."""
    weight: int = 0
    """Samples in the sums."""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_MEANS, 0.0))
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, spent: str, seconds: float) -> None:
        """Add to the time spent on something."""
        self.seconds[spent] = self.seconds.get(spent, 0.0) + seconds

    def count(self, name: str) -> None:
        """Count something."""
        self.more[name] = self.more.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the means over the samples; nothing without any."""
        return {name: each / self.weight for name, each in self.sums.items() if self.weight}


Spend = Callable[[Spent], None]
"""Tells what time is spent on from now on."""


def steady_clock() -> Callable[[], float]:
    """Return a clock that tells seconds since the epoch and is never set while it runs."""
    ahead_s = time.time() - time.monotonic()
    return lambda: ahead_s + time.monotonic()


class Ledger:
    """The ledger of one start; a listener of events too."""

    def __init__(
        self, descriptor: int, *, started_at: float, launched_at: float, cause: str,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            descriptor: An empty file to write to.
            started_at: When this process was started; seconds since the epoch.
            launched_at: When whoever has started it was; counts if this is its first start.
            cause: Why the start before it has ended, as far as is known.
            clock: Seconds since the epoch; see `steady_clock`.
        """
        self._now = clock
        self._lock = threading.Lock()
        self._descriptor = descriptor
        self._offset = self._width = 0
        self._created_at = started_at
        self._spent = Spent.STARTUP
        self._since = started_at
        self._totals = dict.fromkeys(_OF_A_START, 0.0)
        self._is_stopping = self._is_ended = False
        self._ending: dict[str, str] = {}
        """What the last line says of how this start has ended."""
        self._batch_count = 0
        self._write({
            "is": "start", "version": VERSION, "host": socket.gethostname(), "pid": os.getpid(),
            "started_at": started_at, "launched_at": launched_at, "cause": cause,
        })  # fmt: skip
        self._next_line()
        self._line = _Line(started_at, 0)

    def spend(self, spent: Spent) -> None:
        """Spend time on this from now on; also a sign that the same goes on."""
        with self._lock:
            if not self._is_ended and not self._is_stopping:
                self._pass_time()
                self._spent = spent
                self._write_span()

    def move(self, seconds: float, source: Spent, target: Spent) -> None:
        """Say that some of the time that was spent on one thing was spent on another."""
        with self._lock:
            for spent, change in ((source, -seconds), (target, seconds)):
                self._line.add(spent, change)
                self._totals[spent] += change

    def totals(self) -> dict[str, float]:
        """Return the seconds of this start by what they were spent on so far.

        What is productive may turn out to be lost work; only a later start knows.
        """
        with self._lock:
            totals = dict(self._totals)
            if not self._is_ended:
                totals[self._spent] += self._now() - self._since
            return {str(spent): seconds for spent, seconds in totals.items()}

    def belong(self, run: Mapping[str, Any]) -> None:
        """Say which run this start is of.

        Args:
            run: Its `run_id`, `branch`, `generation` and `created_at`.
        """
        self._created_at = float(run["created_at"])
        self._run = {name: run[name] for name in ("run_id", "branch", "generation", "created_at")}

    def __call__(self, event: Event) -> None:
        """Write down what matters of an event."""
        with self._lock:
            if self._is_ended:
                return
            self._pass_time()
            if take := _TAKE.get(type(event)):
                take(self, event)
            if name := _COUNTED.get(type(event)):
                self._line.count(name)
            self._write_span()

    def stop(self, reason: str) -> None:
        """Say why this start ends; from now on it saves, whatever else is still at work in it."""
        with self._lock:
            if not self._is_ended:
                self._pass_time()
                self._spent, self._is_stopping = Spent.SAVE_STALL, True
                self._ending = {"reason": reason}
                self._write_span()

    def end(self) -> None:
        """Write nothing any more after this."""
        with self._lock:
            if not self._is_ended:
                self._pass_time()
                self._close_span()
                self._is_ended = True

    # -- what events say ---------------------------------------------------------------------------

    def _start(self, event: events.Started) -> None:
        self._close_span()
        self._write({
            "is": "training", **self._run, **event.progress.as_dict(),
            "source": event.source, "world_size": event.world_size,
            "num_parameters": event.num_parameters, "num_samples": event.num_samples,
            "total_batches": event.total_batches, "settings": event.settings,
        })  # fmt: skip
        self._next_line()
        self._batch_count = event.progress.batch_count
        self._line = _Line(self._since, self._batch_count)

    def _batch(self, event: events.Batch) -> None:
        self._batch_count = event.progress.batch_count
        line = self._line
        line.add(Spent.PRODUCTIVE, line.unfinished)
        line.unfinished = 0.0
        line.weight += event.num_samples
        for name in _MEANS:
            line.sums[name] += event.num_samples * getattr(event, name)
        if self._since - line.since >= self._least_span_s():
            self._close_span()
            self._line = _Line(self._since, self._batch_count)

    def _evaluate(self, event: events.Evaluated) -> None:
        self._line.more["evaluation"] = {
            "batch_count": event.progress.batch_count,
            "token_accuracy": event.token_accuracy,
            "exact_accuracy": event.exact_accuracy,
        }

    def _commit(self, event: events.Committed) -> None:
        self._line.count("commits")
        self._line.more["commit_bytes"] = event.num_bytes
        self._line.more["committed"] = event.progress.batch_count

    def _finish(self, event: events.Finished) -> None:
        self._ending = {"reason": FINISHED, "digest": event.digest}

    # -- time --------------------------------------------------------------------------------------

    def _pass_time(self) -> None:
        now = self._now()
        self._totals[self._spent] += now - self._since
        if self._spent is Spent.PRODUCTIVE:
            self._line.unfinished += now - self._since
        else:
            self._line.add(self._spent, now - self._since)
        self._since = now

    def _least_span_s(self) -> float:
        return max(LEAST_SPAN_S, (self._since - self._created_at) / SPANS)

    def _close_span(self) -> None:
        self._write_span()
        self._next_line()

    # -- lines -------------------------------------------------------------------------------------

    def _write_span(self) -> None:
        line = self._line
        self._write({
            "is": "span", "since": line.since, "until": self._since,
            "first": line.first, "last": self._batch_count, "seconds": line.seconds,
            "unfinished": line.unfinished, **line.means(), **line.more, **self._ending,
        })  # fmt: skip

    def _write(self, record: Mapping[str, Any]) -> None:
        """Write the last line, over what stood there."""
        line = json.dumps(record).encode()
        self._width = max(self._width, len(line))
        os.pwrite(self._descriptor, line.ljust(self._width) + b"\n", self._offset)

    def _next_line(self) -> None:
        self._offset += self._width + 1
        self._width = 0


_COUNTED: dict[type[Event], str] = {
    events.CommitFailed: "commit_failures",
    events.Skipped: "skipped",
    events.Diverged: "diverged",
}
_TAKE: dict[type[Event], Callable[..., None]] = {
    events.Started: Ledger._start,
    events.Batch: Ledger._batch,
    events.Evaluated: Ledger._evaluate,
    events.Committed: Ledger._commit,
    events.Finished: Ledger._finish,
}
