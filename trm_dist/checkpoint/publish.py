"""Publishing: bytes become a checkpoint under its documented names, in an order that can be killed.

First the file with a name of its own, then checkpoint_latest.pt; each is durable before the next
begins, so after a kill at any point every documented name holds a whole checkpoint, and latest
never stands before what it points to, nor goes backwards in a run's order (branch, batches).
"""

from collections.abc import Sequence
from typing import Any

from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.seal import MAX_COMMENT_BYTES, Seal, read_seal, verify_seal
from trm_dist.checkpoint.store import Store
from trm_dist.errors import CorruptCheckpointError

_NEEDED = {"run_id", "branch", "origin", "created_at", "batch_count"}
"""What the summary of a checkpoint must tell."""


def publish(
    store: Store, data: bytes | memoryview, *, own_names: Sequence[str], summary: dict[str, Any]
) -> list[str]:
    """Make a sealed checkpoint durable and visible.

    Args:
        store: Where to.
        data: The sealed bytes.
        own_names: Names besides latest; none where only latest is renewed.
        summary: The seal's summary of `data`.

    Returns:
        The names that now hold it.

    Raises:
        OSError: The store failed; what it held before still stands.
    """
    names: list[str] = []
    for name in own_names:
        _put_or_copy(store, data, name, names)
    if not _is_behind_latest(store, summary):
        _put_or_copy(store, data, LATEST, names)
    return names


def read_summary(store: Store, name: str) -> dict[str, Any] | None:
    """Return the summary in a file's seal, unverified; None if there is no file or no seal."""
    try:
        return read_tail(store, name).summary
    except (FileNotFoundError, CorruptCheckpointError):
        return None


def read_tail(store: Store, name: str, size_bytes: int | None = None) -> Seal:
    """Read the seal of a file without reading its weights.

    Args:
        store: Where it lies.
        name: Its name.
        size_bytes: Its size, if the caller has listed the store already.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptCheckpointError: It has no readable seal.
    """
    if size_bytes is None:
        sizes = {entry.name: entry.size_bytes for entry in store.entries()}
        if name not in sizes:
            raise FileNotFoundError(name)
        size_bytes = sizes[name]
    found = read_seal(store.read(name, max(0, size_bytes - MAX_COMMENT_BYTES)))
    if not found.summary.keys() >= _NEEDED:
        raise CorruptCheckpointError("its seal does not say where it stands in a run")
    return found


def is_whole(store: Store, name: str) -> bool:
    """Read a file and verify every byte of it; one that is gone is not whole."""
    try:
        verify_seal(store.read(name))
    except (CorruptCheckpointError, FileNotFoundError):
        return False
    return True


def position(summary: dict[str, Any]) -> tuple[int, int]:
    """Return where a state stands in its run: (branch, batch_count)."""
    return int(summary["branch"]), int(summary["batch_count"])


def _is_behind_latest(store: Store, ours: dict[str, Any]) -> bool:
    """Tell whether latest holds a later state of the same run, every byte of it verified."""
    theirs = read_summary(store, LATEST)
    if theirs is None or theirs["run_id"] != ours["run_id"] or position(ours) >= position(theirs):
        return False
    return is_whole(store, LATEST)


def _put_or_copy(store: Store, data: bytes | memoryview, name: str, names: list[str]) -> None:
    """Write the first name, copy to the others; write again if the first was removed meanwhile."""
    try:
        if names:
            store.copy(names[0], name)
        else:
            store.put(name, data)
    except FileNotFoundError:
        store.put(name, data)
    names.append(name)
