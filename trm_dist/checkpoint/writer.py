"""One commit: a snapshot becomes a checkpoint under its names, then old ones are let go.

Imports no torch: this runs in the persister, which must start fast and be killed cheaply.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from trm_dist.checkpoint.archive import encode
from trm_dist.checkpoint.catalog import find_checkpoints, is_whole
from trm_dist.checkpoint.memory import Held
from trm_dist.checkpoint.names import parse_epoch_name
from trm_dist.checkpoint.publish import publish
from trm_dist.checkpoint.retention import Kept, to_delete
from trm_dist.checkpoint.runs import Run, guard_of
from trm_dist.checkpoint.store import Store
from trm_dist.checkpoint.tfevents import EventFiles
from trm_dist.progress import COUNTERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that is durable and visible."""

    progress: dict[str, int]
    """Its counters."""
    names: list[str]
    num_bytes: int
    seconds: float


class Writer:
    """The one writer of a store, for as long as its generation is the newest."""

    def __init__(self, store: Store, run: Run, *, keep_last: int = 0, keep_every: int = 0) -> None:
        self.run, self.store = run, store
        self._guard = guard_of(store, run)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._known_good: set[tuple[str, str]] = set()
        self._event_files = EventFiles(store, run, self._guard)

    def commit(self, held: Held, own_names: Sequence[str]) -> Commit:
        """Publish a snapshot; one attempt.

        Raises:
            OSError: The store failed; what it held before stands.
            FencedError: Another writer has taken over.
        """
        started_s = time.monotonic()
        pieces, summary = encode(held.header, held.body)
        names = publish(self.store, pieces, own_names=own_names, summary=summary, guard=self._guard)
        seconds = time.monotonic() - started_s
        digits = bytes(pieces[-1][-32:]).decode()
        self._known_good |= {(name, digits) for name in names}
        self._apply_retention()
        self._write_curves(held)
        progress = {name: summary[name] for name in COUNTERS}
        return Commit(progress, names, sum(map(len, pieces)), seconds)

    def _write_curves(self, held: Held) -> None:
        """Write what is new for TensorBoard; what fails is written with a later snapshot."""
        try:
            self._event_files.write(held.header, held.body)
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning("event files could not be written: %s", error)

    def _apply_retention(self) -> None:
        """Delete what is no longer needed; trouble with it never stops training."""
        if not self._keep_last:
            return
        try:
            for name in prunable(
                self.store, self.run, keep_last=self._keep_last, keep_every=self._keep_every,
                known_good=self._known_good,
            ):  # fmt: skip
                self.store.delete(name)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)


def prunable(
    store: Store, run: Run, *, keep_last: int, keep_every: int, known_good: set[tuple[str, str]]
) -> list[str]:
    """Return the names of the current branch that retention no longer needs, oldest first.

    Args:
        store: Where they lie.
        run: Whose they are.
        keep_last: How many of the newest stay, every byte of them verified.
        keep_every: Batch counts that are a multiple of this stay too; 0: none for that reason.
        known_good: Names and digests that were verified before; new ones are added.
    """
    found = [
        (int(each.seal.summary["batch_count"]), each.name, each.seal)
        for each in find_checkpoints(store)
        if each.seal and parse_epoch_name(each.name) and run.is_that_of(each.seal.summary)
    ]
    kept: list[Kept] = []
    for batch_count, name, seal in sorted(found, key=lambda each: each[0], reverse=True):
        # Those that will stay must be good. What is older than enough good ones only goes.
        if len(kept) < keep_last and (name, seal.digest) not in known_good:
            if not is_whole(store, name):
                continue
            known_good.add((name, seal.digest))
        kept.append(Kept(name, batch_count))
    return to_delete(kept, keep_last=keep_last, keep_every=keep_every)
