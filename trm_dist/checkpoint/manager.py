"""The writer's side of checkpoints: capture at each batch boundary, publish when it is time.

Whatever the occasion (interval, time, a signal, an exception, the end), a save publishes the newest
*captured* state; the training thread's live state is never read for it. So a stop can be served by
another thread while the training thread is in the middle of a batch or blocked in a collective.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from trm_dist.checkpoint.names import FINAL, epoch_name, parse_epoch_name
from trm_dist.checkpoint.publish import publish
from trm_dist.checkpoint.resume import find_checkpoints
from trm_dist.checkpoint.retention import Kept, to_delete
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.seal import Seal, verify_seal
from trm_dist.checkpoint.snapshot import Snapshot
from trm_dist.checkpoint.state import to_bytes
from trm_dist.checkpoint.store import Store
from trm_dist.config import CheckpointConfig
from trm_dist.errors import CorruptCheckpointError, StoreError
from trm_dist.events import CommitFailed, Committed, Emit
from trm_dist.progress import COUNTERS, Progress

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class CheckpointManager:
    """Owns the snapshot and the store; one per run, in the writer.

    `capture`, `save_if_due` and `save_final` belong to the training thread, `save_newest` may be
    called from any thread. A lock keeps a snapshot that is being published from being overwritten.
    """

    def __init__(
        self, store: Store, run: Run, config: CheckpointConfig, emit: Emit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store = store
        self._run = run
        self._config = config
        self._emit = emit
        self._clock = clock
        self._lock = threading.RLock()
        self._snapshot = Snapshot()
        self._captured: Progress | None = None
        self._first: Progress | None = None
        self._committed: Progress | None = None
        self._known_good: set[tuple[str, str]] = set()
        self._last_commit_s = clock()
        self._failures = _Failures()

    @property
    def captured(self) -> Progress | None:
        """The newest captured boundary."""
        return self._captured

    def freeze(self) -> None:
        """Let no more state be captured: the training thread waits from its next boundary on.

        For the thread that stops the process, which alone can still save.
        """
        self._lock.acquire()  # never released

    def capture(self, tree: dict[str, Any]) -> None:
        """Copy the state of a batch boundary; it may change once this returns."""
        with self._lock:
            self._snapshot.capture(tree)
            self._captured = Progress(**{name: tree[name] for name in COUNTERS})
            self._first = self._first or self._captured

    def save_if_due(self) -> None:
        """Publish the captured state when the interval or the time has come, or a retry has.

        Raises:
            StoreError: No commit has worked for longer than the deadline.
        """
        assert self._captured is not None, "capture comes first"
        now, names = self._clock(), self._due_names()
        is_time = now - self._last_commit_s >= self._config.latest_every_s
        if (names or is_time or self._failures.count) and now >= self._failures.retry_at_s:
            self._try_publish(names)

    def save_newest(self) -> bool:
        """Publish the captured state, unless it is committed; one attempt, any thread.

        Returns:
            Whether the newest captured state is in the store now.
        """
        with self._lock:
            if self._captured is None or self._captured == self._committed:
                return True
            # Where this start began has a name already, and a branch's origin must stay as it is.
            own_names = [] if self._captured == self._first else self._due_names()
            try:
                self._publish(own_names)
            except OSError as error:
                logger.error("the newest state could not be saved: %s", error)
                return False
            return True

    def save_final(self) -> None:
        """Publish the captured state as final and latest, trying until the deadline.

        Raises:
            StoreError: No commit has worked for longer than the deadline.
        """
        while not self._try_publish([FINAL]):
            time.sleep(max(0.0, self._failures.retry_at_s - self._clock()))

    def _due_names(self) -> list[str]:
        """Return the name of its own that the captured state gets, if the interval says so."""
        at = self._captured
        assert at is not None, "capture comes first"
        is_due = at.batch_count % self._config.checkpoint_interval == 0
        return [epoch_name(at.epoch, at.batch_idx)] if is_due else []

    def _try_publish(self, own_names: Sequence[str]) -> bool:
        try:
            with self._lock:
                self._publish(own_names)
        except OSError as error:
            self._note_failure(error)
            return False
        self._failures = _Failures()
        self._apply_retention()
        return True

    def _publish(self, own_names: Sequence[str]) -> None:
        assert self._captured is not None, "capture comes first"
        started_s = self._clock()
        data, summary = to_bytes(self._snapshot.tree())
        with data:
            names = publish(self._store, data, own_names=own_names, summary=summary)
            num_bytes = len(data)
        self._committed = self._captured
        self._last_commit_s = self._clock()
        seconds = self._last_commit_s - started_s
        self._emit(
            Committed(progress=self._captured, names=names, num_bytes=num_bytes, seconds=seconds)
        )

    def _note_failure(self, error: OSError) -> None:
        assert self._captured is not None, "capture comes first"
        now = self._clock()
        self._failures = self._failures.another(now)
        failed_for_s = now - self._failures.first_at_s
        if failed_for_s >= self._config.store_deadline:
            raise StoreError(
                f"{self._store.url}: no checkpoint could be written for {failed_for_s:.0f} s "
                f"({self._failures.count} attempts), the last time because of: {error}. What was "
                "written before stands. Mend the cause and give the same command again, or raise "
                "--store-deadline."
            ) from error
        self._emit(
            CommitFailed(
                progress=self._captured,
                error=str(error),
                num_failures=self._failures.count,
                retry_in_s=self._failures.retry_at_s - now,
            )
        )

    def _apply_retention(self) -> None:
        """Delete what is no longer needed; trouble with it never stops training."""
        if not self._config.keep_last:
            return
        try:
            found = find_checkpoints(self._store)
            kept = [
                Kept(each.name, int(each.seal.summary["batch_count"]))
                for each in found
                if each.seal and parse_epoch_name(each.name) and self._counts(each.name, each.seal)
            ]
            for name in to_delete(
                kept, keep_last=self._config.keep_last, keep_every=self._config.keep_every
            ):
                self._store.delete(name)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _counts(self, name: str, seal: Seal) -> bool:
        """Tell whether retention counts a file: of the current branch, and every byte verified."""
        if (seal.summary["run_id"], seal.summary["branch"]) != (self._run.run_id, self._run.branch):
            return False
        if (name, seal.digest) not in self._known_good:
            try:
                verify_seal(self._store.read(name))
            except (CorruptCheckpointError, FileNotFoundError):
                return False
            self._known_good.add((name, seal.digest))
        return True


class _Failures:
    """Commits that failed since the last one that worked."""

    def __init__(
        self, count: int = 0, first_at_s: float = 0.0, retry_at_s: float = -math.inf
    ) -> None:
        self.count = count
        self.first_at_s = first_at_s
        self.retry_at_s = retry_at_s

    def another(self, now: float) -> "_Failures":
        pause_s = min(FIRST_PAUSE_S * 2**self.count, LONGEST_PAUSE_S)
        return _Failures(self.count + 1, self.first_at_s if self.count else now, now + pause_s)
