"""Signals that ask to stop, heard at once even while the training thread cannot run Python.

The kernel's signal reaches CPython's C handler, which writes its number into a pipe; a thread
reads the pipe. So a worker that waits in a collective for a dead peer still stops in time, and the
Python-level handler has nothing to do. The first signal calls back in a thread of its own; a second
Ctrl+C leaves at once.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from trm_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def exit_code(signum: int) -> int:
    """Return the exit code of a stop: 143 for a preemption, 130 for Ctrl+C."""
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_PREEMPTED


class StopListener:
    """Listens from `start` on; must be started in the main thread."""

    def __init__(self, on_stop: Callable[[int], None]) -> None:
        self._on_stop = on_stop
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self.stopping = threading.Event()
        """Set once a stop was asked for; the callback then ends the process."""

    def start(self) -> None:
        """Install the handlers and the thread."""
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for each in STOP_SIGNALS:
            signal.signal(each, _ignore)
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def _listen(self) -> None:
        while True:
            for signum in os.read(self._read_end, 64):
                if signum not in STOP_SIGNALS:
                    continue
                if not self.stopping.is_set():
                    self.stopping.set()
                    threading.Thread(target=self._on_stop, args=(signum,), daemon=True).start()
                elif signum == signal.SIGINT:
                    os._exit(exit_code(signum))


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """Do nothing: the pipe has it already."""
