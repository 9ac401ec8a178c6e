"""A training step on a GPU, beside plain code and tiny-recursive-model; snapshots, and restarts.

    python -m tests.benchmarks.gpu [--dims DIM ...]

A step is one supervision step of a shard. Ours is recorded (CUDA graphs), with the kernels that
torch brings and with those that its compiler writes (--compile); the others are as they come, and
with their network behind torch.compile. Restarts are those of two workers on the one GPU after a
`kill -9`; what was compiled lies on the disk.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor import config as inductor_config

from tests.benchmarks import recovery
from tests.benchmarks import step as sizes
from trm_dist.checkpoint.memory import private_slots
from trm_dist.checkpoint.snapshot import Flat, pin
from trm_dist.config import Config
from trm_dist.elastic.world import World
from trm_dist.model.ema import Ema
from trm_dist.model.graphs import record
from trm_dist.model.kernels import compile_network
from trm_dist.model.optim import Optimizer
from trm_dist.model.supervision import Rows, Supervision
from trm_dist.model.trm import Precision, Shape, Trm
from trm_dist.train import pin_numerics

ROWS, POSITIONS = 96, 81
"""A shard of the paper's batch of 768, and 9x9 puzzles."""

BLOCKS, BLOCK_S = 5, 0.3
DEVICE = torch.device("cuda")

Step = Callable[[], None]


def ours(
    dim: int, precision: Precision, *, net: str = "mlp", is_recorded: bool = True,
    is_compiled: bool = False,
) -> tuple[Step, Callable[[], Any]]:  # fmt: skip
    """Return a step of the trainer's own parts on one shard, and its state."""
    wanted: dict[str, Any] = {
        "net": net, "dim": dim, "depth": sizes.DEPTH, "heads": sizes.HEADS, "seq_len": POSITIONS,
        "h_cycles": sizes.ROUNDS, "l_cycles": sizes.THOUGHTS,
    }  # fmt: skip
    model = asdict(Config().with_values(wanted).model)
    module = Trm(Shape(num_tokens=sizes.TOKENS, **model), seed=0, precision=precision).to(DEVICE)
    task = Supervision(module, n_sup=16, halt_explore=0.1, loss="stablemax", seed=0)
    optimizer = Optimizer(module, lr=1e-4, warmup_steps=0, weight_decay=0.1, clip=1.0)
    ema = Ema(module, 0.999)
    if is_compiled:
        compile_network(module)
    if is_recorded:
        record(module, ROWS)
    chance = np.random.default_rng(0)
    tokens, labels = (
        torch.from_numpy(chance.integers(0, sizes.TOKENS, (ROWS, POSITIONS))) for _ in range(2)
    )
    rows = Rows(np.arange(ROWS), tokens, labels, torch.full((ROWS,), 1 / ROWS), 1).to(DEVICE)
    carry = task.start(rows)

    def step() -> None:
        objective, scores, _ = task.step(module, carry)
        objective.backward()  # type: ignore[no-untyped-call]
        scores.cpu()
        optimizer.clip()
        optimizer.step(0)
        ema.update()

    def state() -> Any:
        return {
            "model": module.state_dict(), "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
        }  # fmt: skip

    return step, state


def others(make: Callable[..., Step], net: str, dim: int, precision: Precision) -> Step:
    """Return a step of plain code or the peer, under autocast where it is to be bf16."""
    with DEVICE:
        step = make(sizes.Case(net, dim, POSITIONS, ROWS), World())
    return sizes.cast(step, precision, DEVICE.type)


def timed(step: Step, times: int) -> float:
    """Return seconds of a step."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / times


def ways_of(net: str, dim: int, precision: Precision) -> dict[str, Callable[[], Step]]:
    """Return what makes the step of each way."""
    mine = partial(ours, dim, precision, net=net)
    theirs = partial(others, net=net, dim=dim, precision=precision)
    return {
        "ours, compiled": lambda: mine(is_compiled=True)[0],
        "ours": lambda: mine()[0],
        "ours, not recorded": lambda: mine(is_recorded=False)[0],
        "plain": lambda: theirs(sizes.plain),
        "plain, compiled": lambda: theirs(partial(sizes.plain, is_compiled=True)),
        "tiny-recursive-model": lambda: theirs(sizes.peer),
        "tiny-recursive-model, compiled": lambda: theirs(partial(sizes.peer, is_compiled=True)),
    }


def settle(name: str) -> None:
    """Let ours be deterministic; the others are not, as they come."""
    is_ours = name.startswith("ours")
    torch.use_deterministic_algorithms(is_ours)
    inductor_config.deterministic = is_ours


def steps(net: str, dim: int, precision: Precision) -> None:
    """Print what a step takes in every way, in turns."""
    torch._dynamo.reset()  # it compiles no function more than eight times
    found: dict[str, Step] = {}
    for name, make in ways_of(net, dim, precision).items():
        settle(name)
        began_s = time.perf_counter()
        try:
            step = make()
            step()
        except (ImportError, RuntimeError) as error:  # it is not installed, or not for the compiler
            print(f"  {name} takes no part: {str(error).splitlines()[0]}")
            continue
        torch.cuda.synchronize()
        print(f"    {name}: first step after {time.perf_counter() - began_s:.1f} s", flush=True)
        found[name] = step
    took: dict[str, list[float]] = {name: [] for name in found}
    times = {name: max(1, int(BLOCK_S / timed(each, 3))) for name, each in found.items()}
    for _ in range(BLOCKS):
        for name, each in found.items():
            settle(name)
            took[name].append(timed(each, times[name]))
    best = min(statistics.median(each) for name, each in took.items() if "ours" not in name)
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        print(
            f"  {net} dim {dim} {precision} {name:31} {1000 * middle:7.2f} ms "
            f"({1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}), "
            f"{ROWS / middle:8.0f} samples/s, {best / middle:.2f} of the best other's rate",
            flush=True,
        )


def main(dims: list[int]) -> None:
    """Measure all sizes."""
    pin_numerics(1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ROWS} rows", flush=True)
    for dim in dims:
        for net, precision in (("mlp", "bf16"), ("mlp", "fp32"), ("attn", "bf16")):
            steps(net, dim, precision)
            gc.collect()  # recorded steps hold their memory in cycles
            torch.cuda.empty_cache()
    restarts()
    snapshots(max(dims))  # last: its pinned memory is given back without being released


def restarts() -> None:
    """Print what two launched workers take to start, and to be back after one was killed."""
    for name, flags in {"recorded": [], "recorded, compiled": ["--compile"]}.items():

        def command(where: Path, every: int, flags: list[str] = flags) -> list[str]:
            return [*recovery.launched(where, every), "--device", "cuda", *flags]

        found = recovery.restarts(recovery.Way(recovery.LAUNCHED, command), victims=(1, 0))
        for what, seconds in found.items():
            values = ", ".join(f"{each:.2f}" for each in seconds)
            print(f"  two workers, {name}, {what}: {values} s", flush=True)


def snapshots(dim: int) -> None:
    """Print what a copy of the state to the host takes, pinned and not."""
    _, state = ours(dim, "fp32", is_recorded=False)
    flat = Flat(state())
    slots = private_slots(num_slots=2, header_bytes=len(flat.header), body_bytes=flat.num_bytes)
    slots.touch()
    for name in ("not pinned", "pinned"):
        if name == "pinned":
            started_s = time.perf_counter()
            pin(slots.whole)
            took_s = time.perf_counter() - started_s
            print(f"  to pin {len(slots.whole) / 2**20:.0f} MiB: {took_s:.3f} s")
        seconds = statistics.median(
            timed(lambda: Flat(state()).copy_to(slots.begin(0)), 1) for _ in range(9)
        )
        rate = flat.num_bytes / seconds / 1e9
        size = f"{flat.num_bytes / 2**20:.0f} MiB"
        print(f"  snapshot of {size}, {name}: {1000 * seconds:.2f} ms, {rate:.1f} GB/s")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    main(asked.parse_args().dims)
