"""All workers of one mind: the writer's plan, and the newest state that any node remembers.

The writer knows the store and the memory of its own node. When that node is new, or was gone for a
while, another one remembers more; then its state is taken, so the loss of a node costs nothing as
long as one other lives.
"""

import json
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from trm_dist.checkpoint.memory import SnapshotDir
from trm_dist.checkpoint.resume import MEMORY, Remembered, newest_of, remembered
from trm_dist.checkpoint.runs import Run, read_run
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.store import open_store
from trm_dist.config import Config
from trm_dist.elastic.world import Group
from trm_dist.errors import ConfigError, is_away
from trm_dist.plan import Plan, environment, from_message, plan_from, to_message

logger = logging.getLogger(__name__)

_VISIBLE_WITHIN_S = 10.0
"""How long what one node has written may take until another one sees it, as on NFS."""

_POLL_S = 0.2


def share_plan(
    plan: Plan | None, config: Config, given: frozenset[str], group: Group
) -> tuple[Plan, str]:
    """Return the plan that all workers follow, and the identity of the store.

    Args:
        plan: The writer's; None in the others.
        config: What the command line said.
        given: Names of the settings that were really given.
        group: The formed process group.

    Raises:
        UserError: This node's data or store are not the writer's, or the flags do not go with the
            state.
    """
    about = json.loads(bytes(group.broadcast(_describe(plan, config) if plan else b"")))
    run = Run(**about["run"])
    _check_store_is_shared(run, config, group)
    ours: Remembered | None = None
    state: dict[str, Any] | None = None
    if group.world.is_first_of_node and not group.world.is_writer:
        memory = SnapshotDir(config.checkpoint.snapshot_dir, about["identity"])
        ours = newest_of(run, remembered(memory.held()))
    holder = _find_holder(about["batch_count"], ours, group)
    if holder:
        held = ours.held.copied() if ours and holder == group.world.rank else None
        header, body = (held.header, held.body) if held else (b"", memoryview(b""))
        state = _share_state(header, body, group, holder)
        if plan:
            source = f"{MEMORY} of worker {holder}"
            logger.info("worker %d remembers a newer state than this node and the store", holder)
            assert state is not None, "shared"
            run = replace(run, starts_at=int(state["batch_count"]))
            start = replace(plan.start, run=run, source=source, state=state, is_unnamed=True)
            plan = plan_from(start, config, given)
    elif about["batch_count"] >= 0:
        state = _share_plans_state(plan, group)
    message = bytes(group.broadcast(to_message(plan) if plan else b""))
    plan = plan or from_message(message, state, config)
    _compare_environments(environment(plan.config), group)
    return plan, about["identity"]


def _check_store_is_shared(run: Run, config: Config, group: Group) -> None:
    """Find a store that is another one on another node: every node must see the writer's claim.

    Raises:
        ConfigError: In all workers alike.
    """
    trouble = ""
    if group.world.is_first_of_node and not group.world.is_writer:
        trouble = why_unseen(run, config.checkpoint.checkpoint_dir, _VISIBLE_WITHIN_S)
    told = [each.decode() for each in group.gather(trouble.encode())]
    if first := next(filter(None, told), None):
        message = (
            f"--checkpoint-dir {config.checkpoint.checkpoint_dir} is not shared by the nodes: "
            f"{first}. Use s3://BUCKET/RUN or a directory that is mounted on all of them."
        )
        raise ConfigError(message if group.world.is_first_of_node else "")


def why_unseen(run: Run, url: str, wait_s: float) -> str:
    """Return why this node does not see the writer's claim; empty: it does, or cannot tell now."""
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            found = read_run(open_store(url))
            if found and found.writer == run.writer:
                return ""
            trouble = f"{socket.gethostname()} does not see what {_host_of(run)} has written there"
        except OSError as error:
            trouble = f"{socket.gethostname()} cannot read it ({error})"
            if is_away(error) and time.monotonic() > give_up_at:  # only the writer needs it now
                logger.warning("--checkpoint-dir %s: %s. Going on.", url, trouble)
                return ""
        if time.monotonic() > give_up_at:
            return trouble
        time.sleep(_POLL_S)


def _host_of(run: Run) -> str:
    return run.writer.split(":")[0]


def _compare_environments(ours: Mapping[str, str], group: Group) -> None:
    """Warn when workers may compute other bits than the first one."""
    told = group.gather(json.dumps({**ours, "host": socket.gethostname()}).encode())
    if group.world.is_writer:
        for line in differences([json.loads(each) for each in told]):
            logger.warning("%s", line)


def differences(environments: Sequence[Mapping[str, str]]) -> list[str]:
    """Say which workers' environments are not that of the first one.

    Args:
        environments: By rank; `host` names the machine and is not compared.
    """
    first = environments[0]
    lines: dict[tuple[str, str, str], int] = {}
    for rank, each in enumerate(environments):
        for name in sorted(first.keys() - {"host"}):
            if each[name] != first[name]:
                lines.setdefault((each["host"], name, each[name]), rank)
    return [
        f"{name} is {value} in worker {rank} on {host} and {first[name]} in worker 0 on "
        f"{first['host']}: the last bits of the results will depend on which of them computes what"
        + ("; --cpu-capability makes them alike" if name == "cpu_capability" else "")
        for (host, name, value), rank in lines.items()
    ]


def _describe(plan: Plan, config: Config) -> bytes:
    state = plan.start.state
    return json.dumps({
        "identity": open_store(config.checkpoint.checkpoint_dir).identity,
        "run": asdict(plan.start.run),
        "batch_count": state["batch_count"] if state else -1,
    }).encode()  # fmt: skip


def _find_holder(writers_count: int, ours: Remembered | None, group: Group) -> int:
    """Return the worker whose node remembers more than the writer knows; 0: none does."""
    counts = torch.zeros(group.world.size, dtype=torch.int64)
    if group.world.is_writer:
        counts[0] = writers_count + 1
    elif ours:
        counts[group.world.rank] = ours.batch_count + 1
    known: list[int] = group.sum_(counts).tolist()
    return known.index(max(known))


def _share_plans_state(plan: Plan | None, group: Group) -> dict[str, Any] | None:
    """Send the state that the writer has read to the others."""
    if group.world.size == 1:
        return plan.start.state if plan else None
    if plan is None or plan.start.state is None:
        return _share_state(b"", b"", group, 0)
    flat = Flat(plan.start.state)
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)
    return _share_state(flat.header, buffer, group, 0)


def _share_state(
    header: bytes, body: bytes | memoryview, group: Group, source: int
) -> dict[str, Any]:
    received = bytes(group.broadcast(header, source))
    return unflatten(received, group.broadcast(body, source))
