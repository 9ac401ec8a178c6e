"""All workers of one mind: the writer's plan, and the newest state that any node remembers.

The writer knows the store and the memory of its own node. When that node is new, or was gone for a
while, another one remembers more; then its state is taken, so the loss of a node costs nothing as
long as one other lives.
"""

import json
import logging
from dataclasses import asdict
from typing import Any

import torch

from trm_dist.checkpoint.memory import SnapshotDir
from trm_dist.checkpoint.resume import MEMORY, Remembered, Start, newest_of, remembered
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.store import open_store
from trm_dist.config import Config
from trm_dist.elastic.world import Group
from trm_dist.plan import Plan, from_message, plan_from, to_message

logger = logging.getLogger(__name__)


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
        UserError: This node's data are not the writer's, or the flags do not go with the state.
    """
    about = json.loads(bytes(group.broadcast(_describe(plan, config) if plan else b"")))
    run = Run(**about["run"])
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
            plan = plan_from(Start(run, source, state, is_unnamed=True), config, given)
    elif about["batch_count"] >= 0:
        state = _share_plans_state(plan, group)
    message = bytes(group.broadcast(to_message(plan) if plan else b""))
    return plan or from_message(message, state), about["identity"]


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
