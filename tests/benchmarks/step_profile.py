"""Which operators a training step spends its time in.

python -m tests.benchmarks.step_profile [mlp|attn [DIM [POSITIONS]]]

The step is that of `tests.benchmarks.step`. Its first column is the operator's own time as a share
of the step's, of which the interpreter's shows as DistributedDataParallel.forward.
"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.step import Case, ours
from trm_dist.elastic.world import World, form_group
from trm_dist.train import pin_numerics

NUM_SHOWN, ROWS = 12, 32


def main(net: str = "mlp", dim: str = "128", positions: str = "81") -> None:
    """Print the operators of one step, the longest first."""
    pin_numerics(1)
    world = World.from_environment({})
    group = form_group(world, {}, 600)
    step = ours(Case(net, int(dim), int(positions), ROWS), world)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    rows = sorted(found.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in rows)
    print(f"{net} dim {dim} seq {positions}, torch {torch.__version__}: {total / 1000:.0f} ms")
    for each in rows[:NUM_SHOWN]:
        share = each.self_cpu_time_total / total
        print(f"  {share:6.1%} {each.count:6} times  {each.key}")
    group.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
