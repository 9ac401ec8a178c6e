"""What the kernel says of processes. Linux only; elsewhere every question raises OSError."""

import os
import signal
import time
from contextlib import suppress

_STATE, _START_TICKS = 0, 19


def started_at(pid: int) -> float:
    """Return when a process was started, in seconds since the epoch, to a hundredth.

    Raises:
        OSError: There is no such process.
    """
    ticks = int(_status(pid)[_START_TICKS])
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted_at + ticks / os.sysconf("SC_CLK_TCK")


def start_mark(pid: int) -> str:
    """Return what tells a process from an older one with the same number; "0": it is gone."""
    try:
        return _status(pid)[_START_TICKS]
    except OSError:
        return "0"


def is_stopped(pid: int) -> bool:
    """Tell whether a signal has stopped a process."""
    try:
        return _status(pid)[_STATE] in {"T", "t"}
    except OSError:
        return False


def ended_by(code: int) -> str:
    """Say how a process has ended, by its exit code; a negative one is that of a signal."""
    if code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the name, which may hold anything."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rsplit(")", 1)[1].split()
