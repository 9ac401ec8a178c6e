"""A training step on a GPU, beside plain code and tiny-recursive-model; and what a snapshot costs.

python -m tests.benchmarks.gpu [DIM ...]
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from tests.benchmarks import step as sizes
from trm_dist.checkpoint.memory import private_slots
from trm_dist.checkpoint.snapshot import Flat, pin
from trm_dist.config import Config
from trm_dist.elastic.world import World
from trm_dist.model.ema import Ema
from trm_dist.model.graphs import record
from trm_dist.model.optim import Optimizer
from trm_dist.model.supervision import Rows, Supervision
from trm_dist.model.trm import Shape, Trm
from trm_dist.train import pin_numerics

ROWS, POSITIONS = 96, 81
"""A shard of the paper's batch of 768, and 9x9 puzzles."""

BLOCKS, BLOCK_S = 5, 0.4
DEVICE = torch.device("cuda")

Step = Callable[[], None]


def ours(dim: int, precision: Any, *, is_recorded: bool) -> tuple[Step, Callable[[], Any]]:
    """Return a step of the trainer's own parts on one shard, and its state."""
    wanted: dict[str, Any] = {
        "net": "mlp", "dim": dim, "depth": sizes.DEPTH, "heads": sizes.HEADS, "seq_len": POSITIONS,
        "h_cycles": sizes.ROUNDS, "l_cycles": sizes.THOUGHTS,
    }  # fmt: skip
    model = asdict(Config().with_values(wanted).model)
    module = Trm(Shape(num_tokens=sizes.TOKENS, **model), seed=0, precision=precision).to(DEVICE)
    task = Supervision(module, n_sup=16, halt_explore=0.1, loss="stablemax", seed=0)
    optimizer = Optimizer(module, lr=1e-4, warmup_steps=0, weight_decay=0.1, clip=1.0)
    ema = Ema(module, 0.999)
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


def others(make: Callable[..., Step], dim: int, precision: str) -> Step:
    """Return a step of plain code or the peer, under autocast where it is to be bf16."""
    with DEVICE:
        step = make(sizes.Case("mlp", dim, POSITIONS, ROWS), World())

    def cast() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            step()

    return cast


def timed(step: Step, times: int) -> float:
    """Return seconds of a step."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / times


def main(dims: list[int]) -> None:
    """Measure all sizes."""
    pin_numerics(1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ROWS} rows", flush=True)
    for dim in dims:
        for precision in ("fp32", "bf16"):
            ways = {
                "ours": ours(dim, precision, is_recorded=True)[0],
                "ours, not recorded": ours(dim, precision, is_recorded=False)[0],
            }
            torch.use_deterministic_algorithms(False)  # the others do without
            ways["plain"] = others(sizes.plain, dim, precision)
            try:
                ways["tiny-recursive-model"] = others(sizes.peer, dim, precision)
            except ImportError as error:
                print(error)
            took: dict[str, list[float]] = {name: [] for name in ways}
            times = {name: max(1, int(BLOCK_S / timed(each, 3))) for name, each in ways.items()}
            for _ in range(BLOCKS):
                for name, each in ways.items():
                    torch.use_deterministic_algorithms(name.startswith("ours"))
                    took[name].append(timed(each, times[name]))
            base = statistics.median(took["ours"])
            for name, seconds in took.items():
                middle = statistics.median(seconds)
                print(
                    f"  dim {dim} {precision} {name:22} {1000 * middle:7.2f} ms "
                    f"({1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}), "
                    f"{ROWS / middle:8.0f} samples/s, {base / middle:.2f} of ours",
                    flush=True,
                )
    snapshots(dims[-1])


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
    main([int(each) for each in sys.argv[1:]] or [128, 512])
