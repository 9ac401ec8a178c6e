"""The writer's side of checkpoints: what is captured, what is published, and when.

Whatever the occasion (interval, time, a signal, an exception, the end), a save publishes the newest
*captured* state; the training thread's live state is never read for it. So a stop can be served by
another thread while the training thread is in the middle of a batch or blocked in a collective.

Training stops for the copy alone; the persister does the rest. At most one periodic publish is in
flight: the next checkpoint with a name of its own waits for it, and the wait is measured.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trm_dist.checkpoint.catalog import position, read_summary
from trm_dist.checkpoint.memory import Slots
from trm_dist.checkpoint.names import FINAL, epoch_name
from trm_dist.checkpoint.resume import remembered
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.snapshot import Flat, Layout, Views
from trm_dist.checkpoint.store import Store
from trm_dist.config import CheckpointConfig
from trm_dist.errors import StoreError
from trm_dist.events import CommitFailed, Committed, Emit
from trm_dist.progress import COUNTERS, Progress

logger = logging.getLogger(__name__)

_LISTEN_S = 0.1
_LEAST_SLOTS = 3
"""For one to be published and one to be the newest while one is written."""


class Publishing(Protocol):
    """Who publishes; a `PersisterClient`."""

    def publish(
        self, slot: int, sequence: int, names: list[str], *, is_urgent: bool = False
    ) -> None:
        """Ask for a snapshot to be published."""
        ...

    def events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Return what became of it."""
        ...

    def keep_journal(self, wait_s: float) -> None:
        """Have the copy of the journal brought up to date, waiting a while for it."""
        ...

    def close(self) -> None:
        """Tell that nothing is left to do."""
        ...


class Snapshots:
    """Captures boundary after boundary into slots, such that the newest always stands."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._views: dict[int, Views] = {}
        self._layout: Layout | None = None
        newest = slots.newest()
        self.newest: tuple[int, int] | None = None
        """Slot and sequence number of the newest capture of this process."""
        self._sequence = newest.sequence if newest else 0
        self._newest_slot = newest.slot if newest else -1

    @property
    def memory(self) -> memoryview:
        """All of the memory they lie in."""
        return self._slots.whole

    def has_room(self, busy: Collection[int]) -> bool:
        """Tell whether there is a slot that is not being published."""
        return len(busy) < self._slots.num_slots

    def capture(self, tree: dict[str, Any], busy: Collection[int] = ()) -> None:
        """Copy the state of a batch boundary; it may change once this returns.

        Args:
            tree: The live state.
            busy: Slots that are being published; not all of them.
        """
        flat = Flat(tree, self._layout)
        self._layout = flat.layout
        slot = self._free_slot(busy)
        body = self._slots.begin(slot)
        flat.copy_into(self._views.setdefault(slot, Views(body)))
        self._sequence += 1
        self._slots.finish(slot, self._sequence, flat.header)
        self._newest_slot = slot
        self.newest = slot, self._sequence

    def _free_slot(self, busy: Collection[int]) -> int:
        """Return the slot to write: not one that is published, nor the newest if that can be."""
        free = [slot for slot in range(self._slots.num_slots) if slot not in busy]
        return min(free, key=lambda slot: (slot == self._newest_slot, slot))


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the trainer before has left."""

    busy: Sequence[dict[str, Any]] = ()
    """Its jobs that are still at work."""
    has_name: bool = True
    """Whether the state it has left already has the name it may be due."""


def overdue(
    slots: Slots, store: Store, run: Run, interval: int, *, after: int, before: int
) -> list[dict[str, Any]]:
    """Return the job for what lies in memory under no name, though it was due one.

    When a trainer and its persister are killed at once, nobody is left who knows what was just
    being published. It is one at most, as the next one waits for it. The newest state is none: it
    is captured and named anew.

    Args:
        slots: Of the trainer before.
        store: Where it may have come to be since.
        run: Whose snapshots count.
        interval: Batches between checkpoints with a name of their own.
        after: Batches of the newest one that was there; they are published in their order.
        before: Batches of the newest state.
    """
    if slots.num_slots < _LEAST_SLOTS:  # the next capture would have none but the newest
        return []
    if run.origin and not after:  # the first one of a branch lies there as its origin already
        return []
    for each in remembered(slots.held()):
        at = Progress(**{name: each.summary[name] for name in COUNTERS})
        names = _own_names(at, interval)
        is_due = names and run.is_that_of(each.summary) and after < at.batch_count < before
        if is_due and not _is_there(store, names[0], each.summary):
            return [{"slot": each.held.slot, "sequence": each.held.sequence, "names": names}]
    return []


def _is_there(store: Store, name: str, summary: dict[str, Any]) -> bool:
    """Tell whether a state has its name; one that cannot be asked for is given it again."""
    try:
        there = read_summary(store, name)
    except OSError:
        return False
    return there is not None and position(there) == position(summary)


def _own_names(at: Progress, interval: int) -> list[str]:
    """Return the name of its own that a boundary gets, if the interval says so."""
    # What stands before the first batch has no name: it is a fresh start.
    is_due = at.batch_count and at.batch_count % interval == 0
    return [epoch_name(at.epoch, at.batch_idx)] if is_due else []


class CheckpointManager:
    """Owns the snapshots and the way to the persister; one per run, in the writer.

    `capture`, `save_if_due` and `save_final` belong to the training thread, `save_newest` may be
    called from any thread.
    """

    def __init__(
        self, snapshots: Snapshots, persister: Publishing, config: CheckpointConfig, emit: Emit,
        inherited: "Inherited | None" = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Take over from the writer before.

        Args:
            snapshots: Where boundaries are captured.
            persister: Publishes them.
            config: What is kept, and when.
            emit: Hears the events.
            inherited: What the trainer before has left.
            clock: Seconds.
        """
        self._snapshots = snapshots
        self._persister = persister
        self._config = config
        self._emit = emit
        self._clock = clock
        self.on_wait: Callable[[], object] = lambda: None
        """Called every now and then while training waits for the store."""
        self._lock = threading.RLock()
        self._captured: Progress | None = None
        self._first: Progress | None = None
        self._committed: Progress | None = None
        self._last_commit_s = clock()
        self._waited_s = 0.0
        self._failure = "no answer yet"
        self._is_frozen = False
        inherited = inherited or Inherited()
        self._first_has_name = inherited.has_name
        self._asked = {(job["slot"], job["sequence"]): clock() for job in inherited.busy}
        """When each publish was asked for that is not committed."""

    @property
    def captured(self) -> Progress | None:
        """The newest captured boundary."""
        return self._captured

    @property
    def first(self) -> Progress | None:
        """The first captured boundary: where this start began."""
        return self._first

    def freeze(self, wait_s: float) -> bool:
        """Let no more state be captured: the training thread waits from its next boundary on.

        For the thread that stops the process, which alone can still save.

        Returns:
            Whether it can: not while the training thread waits for a new persister.
        """
        self._is_frozen = True
        return self._lock.acquire(timeout=wait_s)  # never released

    def capture(self, tree: dict[str, Any]) -> None:
        """Copy the state of a batch boundary; it may change once this returns.

        Raises:
            StoreError: All slots are being published, and none has been for the deadline.
            FencedError: Another writer has taken over.
        """
        self._wait_until(lambda: self._snapshots.has_room(self._busy()))
        with self._lock:
            self._snapshots.capture(tree, self._busy())
            self._captured = Progress(**{name: tree[name] for name in COUNTERS})
            self._first = self._first or self._captured

    def save_if_due(self) -> None:
        """Have the captured state published when the interval or the time has come.

        Raises:
            StoreError: No commit has worked for longer than the deadline.
            FencedError: Another writer has taken over.
        """
        self.listen()
        names = self._due_names()
        if names:
            self._wait_until(lambda: not self._asked)
        is_time = self._clock() - self._last_commit_s >= self._config.latest_every_s
        if names or (is_time and not self._asked):
            self._ask(names)
        self._check_deadline()

    def listen(self, wait_s: float = 0.0) -> None:
        """Hear what became of publishes, waiting a while for the first."""
        with self._lock:
            for event in self._persister.events(wait_s):
                self._hear(event)

    def save_soon(self) -> None:
        """Have the captured state published, unless it is or is about to be."""
        with self._lock:
            if not self._is_safe() and self._snapshots.newest not in self._asked:
                # Where this start began has a name already, and a branch's origin stays as it is.
                has_name = self._captured == self._first and self._first_has_name
                self._ask([] if has_name else self._due_names(), urgent=True)

    def save_newest(self, wait_s: float) -> bool:
        """Have the captured state published at once, and wait for it a while; any thread.

        Returns:
            Whether the newest captured state is in the store now.

        Raises:
            FencedError: Another writer has taken over.
        """
        deadline = self._clock() + wait_s
        self.save_soon()
        while not self._is_safe() and self._clock() < deadline:
            self.listen(_LISTEN_S)
        return self._is_safe()

    def save_final(self) -> None:
        """Have the captured state published as final and latest, trying until the deadline.

        Raises:
            StoreError: No commit has worked for longer than the deadline.
            FencedError: Another writer has taken over.
        """
        self._wait_until(lambda: not self._asked)
        self._ask([FINAL])
        self._wait_until(lambda: not self._asked)

    def keep_journal(self, wait_s: float) -> None:
        """Have the copy of the journal in the store brought up to date, waiting a while for it.

        Nothing is done while the training thread waits for a new persister.
        """
        if self._lock.acquire(timeout=wait_s):
            self._persister.keep_journal(wait_s)
            self._lock.release()

    def close(self) -> None:
        """Let the persister end."""
        with self._lock:
            self._persister.close()

    def _is_safe(self) -> bool:
        return self._captured is None or self._captured == self._committed

    def _due_names(self) -> list[str]:
        """Return the name of its own that the captured state gets, if the interval says so."""
        assert self._captured is not None, "capture comes first"
        return _own_names(self._captured, self._config.checkpoint_interval)

    def _ask(self, names: list[str], *, urgent: bool = False) -> None:
        with self._lock:
            assert self._snapshots.newest is not None, "capture comes first"
            self._asked[self._snapshots.newest] = self._clock()
            self._persister.publish(*self._snapshots.newest, names, is_urgent=urgent)

    def _busy(self) -> set[int]:
        return {slot for slot, _ in self._asked}

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for commits; training stands still meanwhile."""
        started_s = self._clock()
        while not holds():
            if self._is_frozen:
                threading.Event().wait()  # the stop saves and ends this process
            self.listen(_LISTEN_S)
            self.on_wait()
            self._check_deadline()
        self._waited_s += self._clock() - started_s

    def _hear(self, event: dict[str, Any]) -> None:
        if event["is"] == "failed":
            self._failure = event["error"]
            self._emit(
                CommitFailed(
                    progress=self._captured or Progress(),
                    error=event["error"],
                    num_failures=event["num_failures"],
                    retry_in_s=event["retry_in_s"],
                )
            )
            return
        self._asked.pop((event["slot"], event["sequence"]), None)
        self._last_commit_s = self._clock()
        self._committed = Progress(**event["progress"])
        self._emit(
            Committed(
                progress=self._committed,
                names=event["names"],
                num_bytes=event["num_bytes"],
                seconds=event["seconds"],
                waited_s=self._waited_s,
            )
        )
        self._waited_s = 0.0

    def _check_deadline(self) -> None:
        failed_for_s = self._clock() - min(self._asked.values(), default=self._clock())
        if self._asked and failed_for_s >= self._config.store_deadline:
            raise StoreError(
                f"{self._config.checkpoint_dir}: no checkpoint could be written for "
                f"{failed_for_s:.0f} s, the last time because of: {self._failure}. What was "
                "written before stands. Mend the cause and give the same command again, or raise "
                "--store-deadline."
            )
