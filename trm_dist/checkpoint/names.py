"""File names of checkpoints: build them, read them, order them by number."""

import re

LATEST = "checkpoint_latest.pt"
FINAL = "checkpoint_final.pt"

_EPOCH_NAME = re.compile(r"checkpoint_epoch_([1-9][0-9]*)_batch_([1-9][0-9]*)\.pt")


def epoch_name(epoch: int, batch_idx: int) -> str:
    """Return the name of the checkpoint after `batch_idx` batches of epoch `epoch`."""
    return f"checkpoint_epoch_{epoch}_batch_{batch_idx}.pt"


def parse_epoch_name(name: str) -> tuple[int, int] | None:
    """Return (epoch, batch_idx) of such a name, None of any other."""
    match = _EPOCH_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a checkpoint may lie under this name."""
    return name in {LATEST, FINAL} or parse_epoch_name(name) is not None
