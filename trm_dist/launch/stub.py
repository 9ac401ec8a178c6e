"""Stands before the elastic agent for a worker that the zygote forks.

The agent starts a command for each worker, waits for it and signals it. This is the command: it
hands its environment and its standard streams to the zygote, passes signals on, and ends as the
worker ends. It imports next to nothing, as it is on the way of every restart.
"""

import json
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(address: str) -> NoReturn:
    """Ask the zygote at an abstract address for a worker, and live as long as it does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        connection.send(bytes([signum]))

    try:
        connection.connect(f"\0{address}")
        with os.fdopen(os.memfd_create("environment"), "wb") as file:  # too large for a message
            file.write(json.dumps(dict(os.environ)).encode())
            file.flush()
            socket.send_fds(connection, [b"start"], [0, 1, 2, file.fileno()])
        for each in SIGNALS:
            signal.signal(each, pass_on)
        answer = connection.recv(64)
    except ConnectionError:
        answer = b""
    _end(int(answer or -signal.SIGKILL))  # without a word: the zygote is gone, and the worker too


def _end(code: int) -> NoReturn:
    """End as the worker has ended: with its exit code, or by the same signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
