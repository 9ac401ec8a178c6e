"""Publishing: bytes become a checkpoint under its documented names, in an order that can be killed.

First the file with a name of its own, then checkpoint_latest.pt; each is durable before the next
begins, so after a kill at any point every documented name holds a whole checkpoint, and latest
never stands before what it points to, nor goes backwards in a run's order (branch, batches).
"""

from collections.abc import Sequence
from typing import Any

from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.seal import MAX_COMMENT_BYTES, Seal, read_seal
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
    if not _stands_before(summary, read_summary(store, LATEST)):
        _put_or_copy(store, data, LATEST, names)
    return names


def read_summary(store: Store, name: str) -> dict[str, Any] | None:
    """Return the summary in a file's seal, unverified; None if there is no file or no seal."""
    try:
        return read_tail(store, name).summary
    except (FileNotFoundError, CorruptCheckpointError):
        return None


def read_tail(store: Store, name: str) -> Seal:
    """Read the seal of a file without reading its weights.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptCheckpointError: It has no readable seal.
    """
    sizes = {entry.name: entry.size_bytes for entry in store.entries()}
    if name not in sizes:
        raise FileNotFoundError(name)
    found = read_seal(store.read(name, max(0, sizes[name] - MAX_COMMENT_BYTES)))
    if not found.summary.keys() >= _NEEDED:
        raise CorruptCheckpointError("its seal does not say where it stands in a run")
    return found


def position(summary: dict[str, Any]) -> tuple[int, int]:
    """Return where a state stands in its run: (branch, batch_count)."""
    return int(summary["branch"]), int(summary["batch_count"])


def _stands_before(ours: dict[str, Any], theirs: dict[str, Any] | None) -> bool:
    """Tell whether `ours` is older than `theirs` of the same run."""
    if theirs is None or theirs.get("run_id") != ours["run_id"]:
        return False
    return position(ours) < position(theirs)


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
