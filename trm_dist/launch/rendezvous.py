"""The store where the nodes of a run meet: a tiny process that outlives all of them.

It belongs on a machine that stays, such as the smallest one there is. When it is lost nevertheless,
another one at the same address is enough: its boot id tells the nodes that it is a new one, and
they start anew from memory.
"""

import os
import secrets
import signal
import threading
from datetime import timedelta

from torch.distributed import TCPStore

from trm_dist.errors import ConfigError
from trm_dist.logs import say

BOOT = "trm_dist/boot"
"""Key of the boot id."""


def serve(host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not a port.")
    ending = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda _signum, _frame: ending.set())
    # torch's store looks up the name of whoever connects and serves nobody meanwhile: 10 s where no
    # name server knows it, so that all nodes take each other for dead. After one failure it does
    # without names, so that one may come soon.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    try:
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
    except Exception as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({str(error).splitlines()[0]}). Choose another "
            "--port, or end what listens there."
        ) from error
    store.set(BOOT, secrets.token_hex(4))
    say(f"rendezvous at {host}:{store.port}")
    while not ending.wait(3600):
        pass
    return 0
