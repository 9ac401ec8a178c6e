"""Publishing: bytes become a checkpoint under its documented names, in an order that can be killed.

First the file with a name of its own, then checkpoint_latest.pt; each is durable before the next
begins, so after a kill at any point every documented name holds a whole checkpoint, and latest
never stands before what it points to, nor goes backwards in a run's order (branch, batches).
"""

from collections.abc import Sequence
from typing import Any

from trm_dist.checkpoint.catalog import is_whole, position, read_summary
from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.seal import Piece
from trm_dist.checkpoint.store import Guard, Store, unguarded


def publish(
    store: Store,
    pieces: Sequence[Piece],
    *,
    own_names: Sequence[str],
    summary: dict[str, Any],
    guard: Guard = unguarded,
) -> list[str]:
    """Make a sealed checkpoint durable and visible.

    Args:
        store: Where to.
        pieces: The sealed bytes, in their order.
        own_names: Names besides latest; none where only latest is renewed.
        summary: The seal's summary.
        guard: Asked before anything becomes visible; raises when it must not.

    Returns:
        The names that now hold it.

    Raises:
        OSError: The store failed; what it held before still stands.
    """
    names: list[str] = []
    for name in own_names:
        _put_or_copy(store, pieces, name, names, guard)
    if not _is_behind_latest(store, summary):
        _put_or_copy(store, pieces, LATEST, names, guard)
    return names


def _is_behind_latest(store: Store, ours: dict[str, Any]) -> bool:
    """Tell whether latest holds a later state of the same run, every byte of it verified."""
    theirs = read_summary(store, LATEST)
    if theirs is None or theirs["run_id"] != ours["run_id"] or position(ours) >= position(theirs):
        return False
    return is_whole(store, LATEST)


def _put_or_copy(
    store: Store, pieces: Sequence[Piece], name: str, names: list[str], guard: Guard
) -> None:
    """Write the first name, copy to the others; write again if the first was removed meanwhile."""
    try:
        if names:
            store.copy(names[0], name, guard)
        else:
            store.put(name, pieces, guard)
    except FileNotFoundError:
        store.put(name, pieces, guard)
    names.append(name)
