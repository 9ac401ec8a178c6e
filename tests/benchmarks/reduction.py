"""What the fixed order of sums costs, beside native DDP at the same global batch.

    python -m tests.benchmarks.reduction [--size full|quick|tiny] [--dim DIM] [--shard-rows ROWS]
    torchrun --nproc_per_node=2 -m tests.benchmarks.reduction [...]

A row has 16 tokens. Three ways are interleaved in one run: native DDP with one big local batch;
native DDP that accumulates the rows of the shards; and ours, the shards with their fixed tree. A
step is one supervision step, forward and backward, up to the reduced gradient. Wall time, and CPU
time of all workers, which counts where there are more workers than cores. Bytes are what the
loopback interface carried. Nothing else may compute or talk meanwhile.
"""

import os
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.table import Goal, Row, parser, publish
from trm_dist.config import Config
from trm_dist.data.dataset import open_dataset
from trm_dist.elastic.reduction import ShardReduction, shards_of
from trm_dist.elastic.world import Group, World, form_group
from trm_dist.feed import Feed
from trm_dist.model.supervision import Rows, Supervision
from trm_dist.model.trm import Shape, Trm
from trm_dist.progress import Progress

SHARDS = 8
SHAPE = {"depth": 2, "h_cycles": 2, "l_cycles": 2}


@dataclass(frozen=True)
class Plan:
    """What is measured, in how many blocks of about how long."""

    dim: int
    rows: int
    """Of a shard."""
    blocks: int
    block_s: float


PLANS = {
    "full": Plan(dim=256, rows=24, blocks=12, block_s=1.5),
    "quick": Plan(dim=256, rows=24, blocks=8, block_s=1.0),
    "tiny": Plan(dim=16, rows=1, blocks=2, block_s=0.01),
}

Step = Callable[[], None]

NATIVE = "native DDP, one local batch"


class Model:
    """A model of its own for each way, behind DDP."""

    def __init__(self, dim: int, seq_len: int, num_tokens: int) -> None:
        config = Config().with_values(SHAPE | {"dim": dim, "seq_len": seq_len, "heads": 2})
        self.module = Trm(Shape(num_tokens=num_tokens, **asdict(config.model)), seed=0)
        self.task = Supervision(self.module, n_sup=2, halt_explore=0.0, loss="stablemax", seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.ddp = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def backward(self, rows: Rows, *, is_last: bool) -> None:
        with nullcontext() if is_last else self.ddp.no_sync():
            objective, _, _ = self.task.step(self.ddp, self.task.start(rows))
            objective.backward()  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None


def ways(world: World, plan: Plan) -> dict[str, Step]:
    """Return the ways to make a step, ours first."""
    dataset = open_dataset("sudoku4:train?count=1000", seq_len=0, overlong="truncate")
    data = Config().with_values({"batch_size": SHARDS * plan.rows, "shards": SHARDS}).data
    feed = Feed(dataset, data)
    batch = feed.batch(Progress())
    mine = shards_of(world.rank, world.size, SHARDS)
    parts = [feed.rows(batch, shard) for shard in (mine or range(1))]
    models = [Model(plan.dim, dataset.seq_len, dataset.num_tokens) for _ in range(3)]
    reduction = ShardReduction(
        models[2].module.parameters(), num_shards=SHARDS, rank=world.rank, world_size=world.size
    )
    models[2].ddp.register_comm_hook(None, reduction.hook)
    whole = joined(parts)

    def one_batch() -> None:
        models[0].drop()
        models[0].backward(whole, is_last=True)

    def accumulated() -> None:
        models[1].drop()
        for number, part in enumerate(parts):
            models[1].backward(part, is_last=number == len(parts) - 1)

    def shards() -> None:
        models[2].drop()
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            models[2].backward(part, is_last=is_last)
            if not is_last:
                reduction.take(mine[number])
                held[0] = max(held[0], len(reduction._held))
        reduction.finish()

    return {"ours": shards, NATIVE: one_batch, "native DDP, accumulating": accumulated}


held = [0]
"""Most gradient buffers that were held besides the parameters' own."""


def joined(parts: list[Rows]) -> Rows:
    samples = torch.cat([torch.from_numpy(part.samples) for part in parts]).numpy()
    tokens = torch.cat([part.tokens for part in parts])
    labels = torch.cat([part.labels for part in parts])
    weights = torch.cat([part.weights for part in parts])
    return Rows(samples, tokens, labels, weights, parts[0].epoch)


def bytes_sent() -> int:
    """Return what the loopback interface has carried so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def measure(step: Step, group: Group, steps: int) -> tuple[float, float, float]:
    """Return seconds, CPU seconds of all workers, and bytes of one step."""
    group.barrier()
    sent, started, used = bytes_sent(), time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    group.barrier()
    seconds, sent = time.perf_counter() - started, bytes_sent() - sent
    cpu = torch.tensor([time.process_time() - used], dtype=torch.float64)
    return seconds / steps, float(group.sum_(cpu)) / steps, sent / steps


def main(plan: Plan, path: str) -> None:
    """Measure all ways, in turns."""
    torch.set_num_threads(1)
    world = World.from_environment(os.environ)
    group = form_group(world, os.environ, 60)
    found = ways(world, plan)
    first = torch.tensor([measure(step, group, 1)[0] for step in found.values()])
    steps = max(1, int(plan.block_s / (float(group.sum_(first)[0]) / world.size)))
    took: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for block in range(plan.blocks + 1):
        for name in list(found)[:: 1 if block % 2 else -1]:
            measured = measure(found[name], group, steps)
            if block:  # the first warms up
                took[name].append(measured)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0])
    peaks = float(group.sum_(peak)) / world.size
    if world.is_writer:
        print(
            f"{world.size} worker(s) on {os.cpu_count()} cores, {plan}; {held[0]} gradient "
            f"buffer(s) held; peak {peaks:.0f} MiB a worker"
        )
        publish(rows_of(took, world, plan), path)
    group.barrier()
    os._exit(0)


def rows_of(
    took: dict[str, list[tuple[float, float, float]]], world: World, plan: Plan
) -> list[Row]:
    """Return rows for wall time, CPU time, and what was sent."""
    size = f"dim {plan.dim}, {SHARDS} shards of {plan.rows * 16} tokens, {world.size} worker(s)"
    goals = {"wall time": Goal(1.03, NATIVE)}
    rows = []
    for index, (what, unit, scale) in enumerate(
        [("wall time", "ms", 1e3), ("CPU time", "ms", 1e3), ("bytes sent", "MiB", 2.0**-20)]
    ):
        values = {name: [scale * one[index] for one in each] for name, each in took.items()}
        rows.append(Row(
            subject="order of sums", what=f"{what} in a step, {size}", unit=unit, better="less",
            ours=values.pop("ours"), peers=values, goal=goals.get(what),
        ))  # fmt: skip
    return rows


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--dim", type=int, help="instead of the size's own")
    options.add_argument("--shard-rows", type=int, help="rows of a shard, instead of the size's")
    asked = options.parse_args()
    own = PLANS[asked.size]
    main(replace(own, dim=asked.dim or own.dim, rows=asked.shard_rows or own.rows), asked.rows)
