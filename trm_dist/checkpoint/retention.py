"""Which checkpoints may go: a pure decision over what is committed."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed checkpoint with a name of its own, of the current branch."""

    name: str
    batch_count: int


def to_delete(kept: Sequence[Kept], *, keep_last: int, keep_every: int) -> list[str]:
    """Return the names that retention no longer needs, oldest first.

    The newest is never among them, nor are checkpoint_latest.pt and checkpoint_final.pt, which are
    not passed in.

    Args:
        kept: Committed and verified checkpoints of the current branch, in any order.
        keep_last: How many of the newest stay; 0: all of them.
        keep_every: Also stay: batch counts that are a multiple of this; 0: none for that reason.
    """
    if not keep_last:
        return []
    by_age = sorted(kept, key=lambda each: each.batch_count)
    return [
        each.name for each in by_age[:-keep_last] if not keep_every or each.batch_count % keep_every
    ]
