"""What saving costs training, beside what else there is.

    python -m tests.benchmarks.saving stop        how long the training thread stands still
    python -m tests.benchmarks.saving throughput  training with a save every 20 steps against none
    torchrun --nproc_per_node=2 -m tests.benchmarks.saving throughput
    ... throughput --without-peers                in two minutes
    ... --size full|quick|tiny

Ways to save are interleaved in one process. Lightning takes part where it is installed
(`make bench-checkpoints` sees to that). Nothing else may compute meanwhile.
"""

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from tests.benchmarks.table import Goal, Row, parser, publish
from trm_dist.checkpoint.client import PersisterClient
from trm_dist.checkpoint.journal import Journal
from trm_dist.checkpoint.manager import CheckpointManager, Snapshots
from trm_dist.checkpoint.memory import remove_if_unlocked, take_slots
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.snapshot import Flat
from trm_dist.config import CheckpointConfig
from trm_dist.elastic.world import Group, World, form_group
from trm_dist.progress import Progress

Save = Callable[[], None]

OURS, COPY, NONE = "trm_dist", "a plain copy", "no saves"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    sizes_mib: tuple[int, ...]
    """Of states."""
    repetitions: int
    width: int
    """Of the network that is trained: seven layers, so 112 MiB of state with 1,024."""
    blocks: int
    """Of training, each of one interval, so that all ways see what else the machine does."""


EVERY = 20
"""Steps from save to save."""

PLANS = {
    "full": Plan((1, 10, 112, 1024), repetitions=9, width=1024, blocks=13),
    "quick": Plan((1, 112), repetitions=9, width=1024, blocks=5),
    "tiny": Plan((1,), repetitions=2, width=64, blocks=2),
}


class Way:
    """One way to save: what stops training, and what waits until the last one is durable."""

    def __init__(self, name: str, save: Save, settle: Save = lambda: None) -> None:
        self.name, self.save, self.settle = name, save, settle


class Ours:
    """Snapshots in /dev/shm and the persister, as the trainer uses them."""

    def __init__(self, directory: str, state: dict[str, Any]) -> None:
        self._state = state
        self._count = 0
        self._run = Run.fresh("bench")
        flat = Flat(self._tree())
        size = {"header_bytes": len(flat.header), "body_bytes": flat.num_bytes}
        self._slots = take_slots("/dev/shm", directory, num_slots=3, **size)
        client = PersisterClient(directory, directory, os.getpid())
        self._run = client.open(self._run, deadline_s=60.0, keep_last=2, keep_every=0)
        client.attach(self._slots, Journal.create(time.time()))
        # A name of its own each time, so that every save is a whole file and a link to it.
        config = CheckpointConfig(checkpoint_interval=1)
        self._manager = CheckpointManager(
            Snapshots(self._slots), client, config, lambda event: None
        )

    def save(self) -> None:
        self._count += 1
        self._manager.capture(self._tree())
        self._manager.save_if_due()

    def settle(self) -> None:
        self._manager.save_newest(60.0)

    def close(self) -> None:
        self._manager.close()
        remove_if_unlocked(self._slots)

    def _tree(self) -> dict[str, Any]:
        progress = Progress(batch_idx=self._count + 1, batch_count=self._count + 1)
        run = self._run.summary()
        return self._state | progress.as_dict() | {"run": run, "format_version": 1}


def ways(directory: str, state: dict[str, Any], tensors: list[Tensor]) -> tuple[list[Way], Ours]:
    ours = Ours(f"{directory}/ours", state)
    targets = [torch.zeros_like(each) for each in tensors]

    def to_file(content: Any, path: str) -> None:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    pending: list[Any] = []

    def dcp_async() -> None:
        settle_dcp()
        pending.append(dcp.async_save(
            state, checkpoint_id=f"{directory}/dcp_async", async_stager=stager, no_dist=True
        ))  # fmt: skip

    def settle_dcp() -> None:
        while pending:
            future = pending.pop()
            getattr(future, "upload_completion", future).result()

    found = [
        Way(COPY, lambda: torch._foreach_copy_(targets, tensors)),
        Way(OURS, ours.save, ours.settle),
        Way("torch.save + fsync", lambda: to_file(state, f"{directory}/plain.pt")),
        Way("DCP save", lambda: dcp.save(state, checkpoint_id=f"{directory}/dcp", no_dist=True)),
        Way("DCP async_save, re-used stager", dcp_async, settle_dcp),
    ]
    return found + _lightning(directory, state), ours


def _lightning(directory: str, state: dict[str, Any]) -> list[Way]:
    if importlib.util.find_spec("lightning") is None:
        print("Lightning is not installed here and takes no part.")
        return []
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    plain, threaded = TorchCheckpointIO(), AsyncCheckpointIO(TorchCheckpointIO())
    futures: list[Any] = []

    def save_threaded() -> None:
        threaded.save_checkpoint(state, f"{directory}/lightning_async.ckpt")
        futures.append(threaded._executor.submit(lambda: None))

    def settle() -> None:
        while futures:
            futures.pop().result()

    return [
        Way("Lightning ModelCheckpoint's file", lambda: plain.save_checkpoint(
            state, f"{directory}/lightning.ckpt")),
        Way("Lightning AsyncCheckpointIO", save_threaded, settle),
    ]  # fmt: skip


def _state_of(tensors: list[Tensor]) -> dict[str, Any]:
    return {"model_state_dict": {str(number): each for number, each in enumerate(tensors)}}


def stop(plan: Plan) -> list[Row]:
    """Measure how long the training thread stands still for a save of each size."""
    return [_stop(size, plan.repetitions) for size in plan.sizes_mib]


def _stop(size_mib: int, repetitions: int) -> Row:
    tensors = [torch.randn(size_mib * 2**18 // 60) for _ in range(60)]
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:
        found, ours = ways(directory, _state_of(tensors), tensors)
        took: dict[str, list[float]] = {way.name: [] for way in found}
        for number in range(repetitions + 1):
            for way in found:
                started = time.perf_counter()
                way.save()
                stopped = time.perf_counter() - started
                way.settle()
                if number:  # the first warms up
                    took[way.name].append(1e3 * stopped)
        ours.close()
    return Row(
        subject="stop of the training thread per save", what=f"state of {size_mib} MiB", unit="ms",
        better="less", ours=took.pop(OURS), limit={COPY: took.pop(COPY)}, peers=took,
        goal=Goal(1.2, COPY),
    )  # fmt: skip


class Loop:
    """A training loop of seven layers with AdamW and averages, alone or under DDP."""

    def __init__(self, world: World, width: int) -> None:
        torch.manual_seed(0)
        layers = [each for _ in range(7) for each in (nn.Linear(width, width), nn.GELU())]
        module = nn.Sequential(*layers)
        self._net = nn.parallel.DistributedDataParallel(module) if world.size > 1 else module
        self._weights = [each.detach() for each in module.parameters()]
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        self._averages = [each.clone() for each in self._weights]
        self._rows = torch.randn(256 // world.size, width)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._net(self._rows).pow(2).mean().backward()
        self._optimizer.step()
        torch._foreach_lerp_(self._averages, self._weights, 0.01)

    def tensors(self) -> list[Tensor]:
        states = self._optimizer.state.values()
        moments = [each[name] for each in states for name in ("exp_avg", "exp_avg_sq")]
        return self._weights + moments + self._averages


def throughput(plan: Plan, path: str, *, with_peers: bool) -> None:
    """Measure the speed of training with a save every so many steps, against none."""
    torch.set_num_threads(1)
    world = World.from_environment(os.environ)
    group = form_group(world, os.environ, 60)
    loop = Loop(world, plan.width)
    for _ in range(3):
        loop.step()
    tensors = loop.tensors()
    directory = tempfile.mkdtemp(dir=os.getcwd()) if world.is_writer else ""
    found, ours = [Way(NONE, lambda: None)], None
    if world.is_writer:
        more, ours = ways(directory, _state_of(tensors), tensors)
        found += [way for way in more if way.name == OURS or (with_peers and way.name != COPY)]
    count = int(group.sum_(torch.tensor([len(found) if world.is_writer else 0])))
    if not world.is_writer:
        found *= count
    rates: dict[int, list[float]] = {number: [] for number in range(count)}
    for block in range(plan.blocks + 1):
        for number in list(range(count))[:: 1 if block % 2 else -1]:
            seconds = _run(loop, group, found[number])
            if block:  # the first warms up
                rates[number].append(EVERY / seconds)
    if ours is not None:
        size_mib = sum(each.nbytes for each in tensors) / 2**20
        values = {way.name: rates[number] for number, way in enumerate(found)}
        row = Row(
            subject="training with saves", what=f"{size_mib:.0f} MiB every {EVERY} steps, "
            f"{world.size} worker(s) on {os.cpu_count()} cores",
            unit="steps/s", better="more", ours=values.pop(OURS), limit={NONE: values.pop(NONE)},
            peers=values, goal=Goal(0.99, NONE),
        )  # fmt: skip
        publish([row], path)
        ours.close()
        shutil.rmtree(directory)
    group.barrier()
    os._exit(0)


def _run(loop: Loop, group: Group, way: Way) -> float:
    """Return how long the steps of an interval take with a save in their middle.

    It has half an interval at least to be written in, as it has where training goes on.
    """
    group.barrier()
    started = time.perf_counter()
    for each in range(1, EVERY + 1):
        loop.step()
        if each == EVERY // 2:
            way.save()
    group.barrier()
    seconds = time.perf_counter() - started
    way.settle()
    group.barrier()
    return seconds


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("what", choices=["stop", "throughput"])
    options.add_argument("--without-peers", action="store_true", help="of throughput: ours alone")
    asked = options.parse_args()
    if asked.what == "throughput":
        throughput(PLANS[asked.size], asked.rows, with_peers=not asked.without_peers)
    if asked.without_peers:
        options.error("--without-peers is of throughput; stop measures all")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    publish(stop(PLANS[asked.size]), asked.rows)
    os._exit(0)
