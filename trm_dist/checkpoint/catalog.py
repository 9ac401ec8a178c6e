"""What lies in a store: every checkpoint by its seal, without reading weights."""

import logging
from dataclasses import dataclass
from typing import Any

from trm_dist.checkpoint.names import is_checkpoint_name
from trm_dist.checkpoint.seal import MAX_COMMENT_BYTES, Seal, read_seal, verify_seal
from trm_dist.checkpoint.store import Store
from trm_dist.errors import CorruptCheckpointError

logger = logging.getLogger(__name__)

_NEEDED = {"run_id", "branch", "origin", "created_at", "batch_count"}
"""What the summary of a checkpoint must tell."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file under a documented name."""

    name: str
    seal: Seal | None
    """None when it has no readable seal, so nothing is known of it."""


def find_checkpoints(store: Store) -> list[Found]:
    """List every checkpoint, reading its seal only."""
    found = []
    for entry in store.entries():
        if is_checkpoint_name(entry.name):
            try:
                found.append(Found(entry.name, read_tail(store, entry.name)))
            except FileNotFoundError:  # removed by hand while we look
                continue
            except CorruptCheckpointError as error:
                logger.warning("%s: %s; it is left in place", entry.name, error)
                found.append(Found(entry.name, None))
    return found


def read_tail(store: Store, name: str) -> Seal:
    """Read the seal of a file without reading its weights.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptCheckpointError: It has no readable seal.
    """
    found = read_seal(store.read(name, -MAX_COMMENT_BYTES))
    if not found.summary.keys() >= _NEEDED:
        raise CorruptCheckpointError("its seal does not say where it stands in a run")
    return found


def read_summary(store: Store, name: str) -> dict[str, Any] | None:
    """Return the summary in a file's seal, unverified; None if there is no file or no seal."""
    try:
        return read_tail(store, name).summary
    except (FileNotFoundError, CorruptCheckpointError):
        return None


def is_whole(store: Store, name: str) -> bool:
    """Read a file and verify every byte of it; one that is gone is not whole."""
    try:
        verify_seal(store.view(name))
    except (CorruptCheckpointError, FileNotFoundError):
        return False
    return True


def position(summary: dict[str, Any]) -> tuple[int, int]:
    """Return where a state stands in its run: (branch, batch_count)."""
    return int(summary["branch"]), int(summary["batch_count"])
