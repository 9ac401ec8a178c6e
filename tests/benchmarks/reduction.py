"""What the fixed order of sums costs, beside native DDP at the same global batch. Prints ratios.

    python -m tests.benchmarks.reduction [DIM [ROWS]]
    torchrun --nproc_per_node=2 -m tests.benchmarks.reduction [DIM [ROWS]]

ROWS are those of a shard, of 16 tokens each. Three ways are interleaved in one run: native DDP with
one big local batch; native DDP that accumulates the rows of the shards; and the shards with their
fixed tree. A step is one supervision step, forward and backward, up to the reduced gradient.
Medians, with their quartiles, over blocks; wall time, and CPU time of all workers, which counts
where there are more workers than cores. Bytes are what the loopback interface carried. Nothing else
may compute or talk meanwhile.
"""

import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from trm_dist.config import Config
from trm_dist.data.dataset import open_dataset
from trm_dist.elastic.reduction import ShardReduction, shards_of
from trm_dist.elastic.world import Group, World, form_group
from trm_dist.feed import Feed
from trm_dist.model.supervision import Rows, Supervision
from trm_dist.model.trm import Shape, Trm
from trm_dist.progress import Progress

SHARDS = 8
DIM, ROWS = (int(each) for each in (*sys.argv[1:], *("128", "24")[len(sys.argv) - 1 :]))
SIZES = {"dim": DIM, "depth": 2, "h_cycles": 2, "l_cycles": 2}

Step = Callable[[], None]


class Model:
    """A model of its own for each way, behind DDP."""

    def __init__(self, seq_len: int, num_tokens: int) -> None:
        config = Config().with_values(SIZES | {"seq_len": seq_len, "heads": 2})
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


def ways(world: World) -> dict[str, Step]:
    """Return the ways to make a step."""
    dataset = open_dataset("sudoku4:train?count=1000", seq_len=0, overlong="truncate")
    data = Config().with_values({"batch_size": SHARDS * ROWS, "shards": SHARDS}).data
    feed = Feed(dataset, data)
    batch = feed.batch(Progress())
    mine = shards_of(world.rank, world.size, SHARDS)
    parts = [feed.rows(batch, shard) for shard in (mine or range(1))]
    models = [Model(dataset.seq_len, dataset.num_tokens) for _ in range(3)]
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

    return {"native DDP, one local batch": one_batch,
            "native DDP, accumulating the shards' rows": accumulated,
            "shards and their tree": shards}  # fmt: skip


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


def main(blocks: int = 12, block_s: float = 1.5) -> None:
    """Measure all ways, in turns."""
    torch.set_num_threads(1)
    world = World.from_environment(os.environ)
    group = form_group(world, os.environ, 60)
    found = ways(world)
    first = torch.tensor([measure(step, group, 1)[0] for step in found.values()])
    steps = max(1, int(block_s / (float(group.sum_(first)[0]) / world.size)))
    took: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for block in range(blocks + 1):
        for name in list(found)[:: 1 if block % 2 else -1]:
            measured = measure(found[name], group, steps)
            if block:  # the first warms up
                took[name].append(measured)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0])
    peaks = float(group.sum_(peak)) / world.size
    if world.is_writer:
        tell(world, took, peaks)
    group.barrier()
    os._exit(0)


def tell(world: World, took: dict[str, list[tuple[float, float, float]]], peak: float) -> None:
    """Print the table."""
    print(
        f"\n{world.size} worker(s) on {os.cpu_count()} cores, {SHARDS} shards of {ROWS * 16} "
        f"tokens, {SIZES}; {held[0]} gradient buffer(s) held; peak {peak:.0f} MiB a worker"
    )
    base = next(iter(took.values()))
    for name, each in took.items():
        wall, cpu = ([a[i] / b[i] for a, b in zip(each, base, strict=True)] for i in (0, 1))
        milliseconds = 1e3 * statistics.median(one[0] for one in each)
        megabytes = statistics.median(one[2] for one in each) / 2**20
        print(
            f"  {name:42} {milliseconds:8.1f} ms, {_quartiles(wall)} of the first in wall time, "
            f"{_quartiles(cpu)} in CPU time, {megabytes:6.2f} MiB sent"
        )
    sys.stdout.flush()


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
