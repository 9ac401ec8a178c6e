"""Everything that leaves the process in words: log records, messages, results."""

import logging
import os
import sys
from contextlib import suppress

_STDERR = 2


def configure(*, rank: int, world_size: int) -> None:
    """Send log records to stderr: the first worker from INFO on, the others from WARNING on."""
    fresh = _fresh_line()
    place = f"[rank {rank}/{world_size}] " if world_size > 1 and rank else ""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"{fresh}%(asctime)s %(levelname)s {place}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in ("botocore", "aiobotocore"):  # where each key was found is not news
        logging.getLogger(name).setLevel(logging.WARNING)


def open_streams() -> None:
    """Send streams that came closed nowhere, so that no file of ours takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _fresh_line() -> str:
    """Return what clears the line of a terminal, where a bar of another process may be."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


def tell(message: str) -> None:
    """Tell a person what is wrong, on stderr; an empty message was told already.

    A reader that has left stops nothing: a save may follow.
    """
    if message:
        with suppress(OSError):
            sys.stderr.write(f"{_fresh_line()}trm_dist: {message}\n")
            sys.stderr.flush()


def say(text: str) -> None:
    """Print a result on stdout; where the reader has left, the command still comes to its end."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        forget_reader()


def forget_reader() -> None:
    """Send what is still printed on stdout nowhere: who read it has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
