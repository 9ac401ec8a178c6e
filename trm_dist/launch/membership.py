"""One node's membership in one rendezvous: torch's elastic agent, run as an expert would run it.

A node alone needs nobody to meet. Several nodes meet in a key-value store that outlives them all
(`rendezvous`). The agents of a job meet under a *generation* there: an agent that has failed in any
way closes its rendezvous for good, so it moves everyone on to the next generation, and the
supervisors follow. A store that was replaced starts over with another boot id, which is part of the
name they meet under and of every move: a move that was meant for the old store does nothing in the
new one.

A node that has shown no sign of life for three seconds is forgotten there, and torch leaves it at
that: the node trains on, and who joins next forms a group without it. Ours notices and joins again.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    create_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trm_dist.errors import EXIT_LOST, EXIT_PREEMPTED
from trm_dist.launch.job import Member
from trm_dist.launch.rendezvous import BOOT

logger = logging.getLogger(__name__)

_BACKEND = "trm_dist"
_CONNECT_S = 2.0
_TELL_EVERY_S = 10.0
_WATCH_EVERY_S = 0.5
_MONITOR_S = 0.03
_MOST_RESTARTS = 10**9
"""The supervisor counts them; an agent that runs out of them would close the rendezvous."""

_RENDEZVOUS = {
    "join_timeout": 86400,  # a node waits for the others as long as it takes
    "last_call_timeout": 1,  # and latecomers are waited for as short as possible
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 3,  # two would be too few on a busy machine
    "read_timeout": 20,
    "is_host": False,
}


class _Handler(DynamicRendezvousHandler):
    """torch's handler of a store, for a node that notices when it is forgotten."""

    def get_backend(self) -> str:
        """Return the name under which torch finds this handler."""
        return _BACKEND

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for the next round; this one does when it is forgotten."""
        waiting: int = super().num_nodes_waiting()
        return waiting or int(self._this_node not in self._state_holder.state.participants)


def _new_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(parameters)
    handler = create_handler(store, backend, parameters)
    handler.__class__ = _Handler  # it has no other state, and torch asks nobody for the class
    return handler


rendezvous_handler_registry.register(_BACKEND, _new_handler)


@dataclass(frozen=True, slots=True)
class Generation:
    """What the agents of a job meet under."""

    boot: str
    number: int


def join(member: Member) -> int:
    """Take part until the run has finished or something has failed.

    Returns:
        0: finished; EXIT_PREEMPTED: told to leave; EXIT_LOST: join again; or how the run has
        ended on another node.
    """
    if "LOGLEVEL" not in os.environ:
        _silence_torch()
    if not member.endpoint:
        return _run(member, member.job, "static", f"127.0.0.1:{_free_port()}", {"rank": 0})
    store = connect(member.endpoint)
    generation = current(store, member.job)
    if outcome(store, member.job, generation) is not None:  # it has ended; this one starts it anew
        move_on(store, member.job, generation)
        generation = current(store, member.job)
    watching = threading.Thread(target=_watch, args=(member, generation), daemon=True)
    watching.start()
    name = f"{member.job}-{generation.boot}-{generation.number}"
    code = _run(member, name, _BACKEND, member.endpoint, _RENDEZVOUS)
    if code == EXIT_LOST:
        move_on(connect(member.endpoint), member.job, generation)
    return code


def _silence_torch() -> None:
    """Let the supervisor tell what happens; torch's agent speaks of stubs."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def conclude(member: Member, code: int) -> None:
    """Tell the other nodes that the run has ended for good."""
    store = connect(member.endpoint)
    generation = current(store, member.job)
    store.set(_outcome_key(member.job, generation), str(code))


def connect(endpoint: str) -> TCPStore:
    """Connect to the store, waiting for it as long as it takes."""
    host, port = split_endpoint(endpoint)
    told_s = time.monotonic()
    while True:
        try:
            # torch tells of each failure in twenty lines of its own, so it is not asked in vain.
            socket.create_connection((host, port), _CONNECT_S).close()
            return TCPStore(
                host, port, is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=_CONNECT_S),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 torch has several for it
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                reason = str(error).splitlines()[0]
                logger.warning("waiting for the rendezvous at %s (%s)", endpoint, reason)
            time.sleep(_WATCH_EVERY_S)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def current(store: TCPStore, job: str) -> Generation:
    """Return the generation that the job is in."""
    boot = store.get(BOOT).decode()
    return Generation(boot, int(store.compare_set(_key(job), "", "0")))


def move_on(store: TCPStore, job: str, generation: Generation) -> None:
    """Move everyone from a generation to the next one; nothing if somebody has, or it is gone."""
    if store.get(BOOT).decode() == generation.boot:
        store.compare_set(_key(job), str(generation.number), str(generation.number + 1))


def outcome(store: TCPStore, job: str, generation: Generation) -> int | None:
    """Return the exit code with which a generation has ended for good; None: it has not."""
    key = _outcome_key(job, generation)
    return int(store.get(key)) if store.check([key]) else None


def _key(job: str) -> str:
    return f"trm_dist/{job}/generation"


def _outcome_key(job: str, generation: Generation) -> str:
    return f"trm_dist/{job}/{generation.number}/outcome"


def _watch(member: Member, generation: Generation) -> None:
    """Leave once the others have moved on, or the run has ended on another node."""
    store = connect(member.endpoint)
    while True:
        time.sleep(_WATCH_EVERY_S)
        try:
            code = outcome(store, member.job, generation)
            has_moved = current(store, member.job) != generation
        except Exception:  # noqa: BLE001 the store is gone
            store = connect(member.endpoint)
            continue
        if code:
            logger.error("the run has ended on another node with exit code %d", code)
            os._exit(code)
        if has_moved:
            logger.warning("the other nodes start anew, and this one with them")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _run(
    member: Member, name: str, backend: str, endpoint: str, settings: Mapping[str, Any]
) -> int:
    config = LaunchConfig(
        min_nodes=member.min_nodes,
        max_nodes=member.max_nodes,
        nproc_per_node=member.num_workers,
        run_id=name,
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs=dict(settings),
        max_restarts=_MOST_RESTARTS,
        monitor_interval=_MONITOR_S,
        local_addr=member.local_addr or None,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
        **_shutdown(member.shutdown_s),
    )
    try:
        elastic_launch(config, member.command[0])(*member.command[1:])
    except SignalException:
        return EXIT_PREEMPTED
    except Exception as error:  # noqa: BLE001 whatever it is, the next try is another one
        logger.warning("the rendezvous has failed (%s: %s)", type(error).__name__, error)
        return EXIT_LOST
    return 0


def main(content: Mapping[str, Any]) -> int:
    """Do what the supervisor says: take part, or tell the others how the run has ended.

    With `move_on` everyone is moved on to the next generation before.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S", stream=sys.stderr, force=True,
    )  # fmt: skip
    values = dict(content)
    code, moves_on = values.pop("conclude", None), values.pop("move_on", False)
    member = Member(**values)
    if code is None:
        try:
            if moves_on and member.endpoint:
                store = connect(member.endpoint)
                move_on(store, member.job, current(store, member.job))
            return join(member)
        except Exception as error:  # noqa: BLE001 torch has several for a store that is gone again
            logger.warning("the rendezvous is gone (%s: %s)", type(error).__name__, error)
            return EXIT_LOST
    conclude(member, code)
    return 0


def _shutdown(seconds: int) -> dict[str, Any]:
    """Say how long workers may take to stop, where torch can be told (not yet in 2.11)."""
    names = {each.name for each in fields(LaunchConfig)}
    return {"shutdown_timeout": seconds} if "shutdown_timeout" in names else {}
