"""Samples a second of one training step, beside a peer, plain eager code, and the processor.

    python -m tests.benchmarks.step [--size full|quick|tiny] [--compiled]
    torchrun --nproc_per_node=2 -m tests.benchmarks.step [--size ...]

A step is one supervision step of some rows a worker: T - 1 rounds without gradient, one with it,
backward, clipping, AdamW, averages. Three ways are interleaved in one run:

- ours: the trainer's own parts, the rows as one shard, halting and scores included;
- plain code: the same formulas as one writes them first: a LayerNorm-like norm by hand, softmax
  cross-entropy, AdamW as it comes, a loop for the averages; no halting, no scores;
- tiny-recursive-model: the package of that name, its network of the same depth and with matrices of
  as many numbers (`pip install tiny-recursive-model`; it is left out where it is not installed).

With more workers than one all are behind DDP; --compiled puts the networks of all behind
torch.compile (ours by the trainer's --compile). Where activations are bf16 the others are under
autocast. The processor's limit is what a large matrix product of the same precision reaches in the
same turns. Nothing else may compute meanwhile.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.table import Goal, Row, parser, publish
from trm_dist.config import Config
from trm_dist.elastic.reduction import ShardReduction
from trm_dist.elastic.world import Group, World, form_group
from trm_dist.model.ema import Ema
from trm_dist.model.kernels import compile_network
from trm_dist.model.layers import inner_width
from trm_dist.model.optim import Optimizer
from trm_dist.model.supervision import Rows, Supervision
from trm_dist.model.trm import Precision, Shape, Trm

TOKENS, DEPTH, ROUNDS, THOUGHTS, HEADS = 11, 2, 3, 6, 4

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A size that is measured."""

    net: str
    dim: int
    positions: int
    rows: int
    """Of each worker."""
    precision: Precision = "fp32"
    """Of the activations."""

    def questions(self) -> tuple[Tensor, Tensor]:
        """Return rows of tokens and their answers."""
        generator = torch.Generator(torch.get_default_device()).manual_seed(self.positions)
        shape = (self.rows, self.positions)
        tokens = torch.randint(0, TOKENS, shape, generator=generator)
        return tokens, torch.randint(0, TOKENS, shape, generator=generator)


@dataclass(frozen=True)
class Plan:
    """What is measured, in how many blocks of about how long."""

    cases: list[Case]
    blocks: int
    block_s: float = 1.0


# A step of the larger width costs sixteen times as much a row, so it has fewer rows.
PLANS = {
    "full": Plan(
        [
            Case(net, dim, positions, {128: 32, 512: 4}[dim])
            for dim, net, positions in product((128, 512), ("mlp", "attn"), (81, 256))
        ]
        + [Case(net, 128, 81, 32, "bf16") for net in ("mlp", "attn")],
        blocks=7,
    ),
    "quick": Plan(
        [
            Case("mlp", 128, 81, 32),
            Case("attn", 128, 81, 32),
            Case("mlp", 512, 81, 4),
            Case("mlp", 128, 81, 32, "bf16"),
            Case("attn", 128, 81, 32, "bf16"),
        ],
        blocks=3,
    ),
    "tiny": Plan(
        [Case("mlp", 32, 16, 2), Case("attn", 128, 16, 2, "bf16")], blocks=2, block_s=0.01
    ),
}


# -- ours ------------------------------------------------------------------------------------------


def ours(case: Case, world: World, *, is_compiled: bool = False) -> Step:
    """Return a step of the trainer's own parts."""
    sizes: dict[str, Any] = {
        "net": case.net, "dim": case.dim, "depth": DEPTH, "heads": HEADS, "seq_len": case.positions,
        "h_cycles": ROUNDS, "l_cycles": THOUGHTS,
    }  # fmt: skip
    config = Config().with_values(sizes)
    shape = Shape(num_tokens=TOKENS, **asdict(config.model))
    module = Trm(shape, seed=0, precision=case.precision)
    if is_compiled:
        compile_network(module)
    task = Supervision(module, n_sup=16, halt_explore=0.1, loss="stablemax", seed=0)
    optimizer = Optimizer(module, lr=1e-4, warmup_steps=0, weight_decay=0.1, clip=1.0)
    ema = Ema(module, 0.999)
    reduction = ShardReduction(
        module.parameters(), num_shards=world.size, rank=world.rank, world_size=world.size
    )
    wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, reduction.hook)
    tokens, labels = case.questions()
    weights = torch.full((case.rows,), 1 / (case.rows * world.size))
    carry = task.start(Rows(torch.arange(case.rows).numpy(), tokens, labels, weights, 1))
    count = [0]

    def step() -> None:
        objective, _, _ = task.step(wrapped, carry)
        objective.backward()  # type: ignore[no-untyped-call]
        reduction.finish()
        optimizer.clip()
        optimizer.step(count[0])
        ema.update()
        count[0] += 1

    return step


# -- plain -----------------------------------------------------------------------------------------


class Gated(nn.Module):
    """SwiGLU of three matrices."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class PlainBlock(nn.Module):
    """A mixer over positions or attention, then a gated MLP."""

    def __init__(self, net: str, dim: int, positions: int, multiple: int) -> None:
        super().__init__()
        self.net = net
        sizes = {"expansion": 4.0, "multiple": multiple}
        if net == "mlp":
            self.mix: nn.Module = Gated(positions, inner_width(positions, **sizes))
        else:
            self.query, self.key, self.value, self.mix = (
                nn.Linear(dim, dim, bias=False) for _ in range(4)
            )
            angles = torch.arange(positions)[:, None] * 10_000.0 ** -(
                torch.arange(0, dim // HEADS, 2) / (dim // HEADS)
            )
            self.register_buffer("angles", torch.cat([angles, angles], -1))
        self.width = Gated(dim, inner_width(dim, **sizes))

    def forward(self, x: Tensor) -> Tensor:
        if self.net == "mlp":
            x = norm(x.mT + self.mix(x.mT)).mT
        else:
            split = [
                each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for each in (self.query, self.key, self.value)
            ]
            query, key = (self.turn(each) for each in split[:2])
            found = F.scaled_dot_product_attention(query, key, split[2])
            x = norm(x + self.mix(found.transpose(1, 2).flatten(2)))
        return norm(x + self.width(x))

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.angles.cos() + torch.cat([-second, first], -1) * self.angles.sin()


class Plain(nn.Module):
    """TRM as one writes it first."""

    def __init__(self, net: str, dim: int, positions: int) -> None:
        super().__init__()
        multiple = 256 if dim >= 512 else 32
        self.embed = nn.Embedding(TOKENS, dim)
        self.blocks = nn.ModuleList(PlainBlock(net, dim, positions, multiple) for _ in range(DEPTH))
        self.head, self.halt = nn.Linear(dim, TOKENS, bias=False), nn.Linear(dim, 1)
        self.register_buffer("start", torch.randn(2, dim))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) * self.embed.embedding_dim**0.5
        y, z = self.start[0].expand_as(x), self.start[1].expand_as(x)
        with torch.no_grad():
            for _ in range(ROUNDS - 1):
                y, z = self.refine(x, y, z)
        y, z = self.refine(x, y, z)
        return self.head(y), self.halt(y[:, 0])[:, 0]

    def refine(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(THOUGHTS):
            z = self.think(x + y + z)
        return self.think(y + z), z

    def think(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


def plain(case: Case, world: World, *, is_compiled: bool = False) -> Step:
    """Return a step of code as one writes it first, or with its network behind torch.compile."""
    module = Plain(case.net, case.dim, case.positions)
    if is_compiled:
        for each in module.blocks:
            each.compile()
    wrapped = DistributedDataParallel(module) if world.size > 1 else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95))
    averages = {name: each.detach().clone() for name, each in module.named_parameters()}
    tokens, labels = case.questions()

    def step() -> None:
        optimizer.zero_grad()
        logits, halt = wrapped(tokens)
        is_right = (logits.argmax(-1) == labels).all(-1).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (loss + 0.5 * F.binary_cross_entropy_with_logits(halt, is_right)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, each in module.named_parameters():
                averages[name].mul_(0.999).add_(each, alpha=0.001)

    return step


# -- the peer --------------------------------------------------------------------------------------


def peer(case: Case, world: World, *, is_compiled: bool = False) -> Step:
    """Return a step of tiny-recursive-model, with the parts that its own trainer uses.

    Args:
        case: The size.
        world: Behind DDP where there are several workers.
        is_compiled: With its network behind torch.compile.

    Raises:
        ImportError: It is not installed.
    """
    from ema_pytorch import EMA
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel
    from x_transformers import Encoder

    dim, positions = case.dim, case.positions
    multiple = 256 if dim >= 512 else 32
    over_width = inner_width(dim, expansion=4.0, multiple=multiple)
    if case.net == "mlp":
        over_positions = inner_width(positions, expansion=4.0, multiple=multiple)
        network = MLPMixer1D(  # of two matrices where ours has three
            dim=dim, depth=DEPTH, seq_len=positions,
            expansion_factor=1.5 * over_positions / dim,
            expansion_factor_token=1.5 * over_width / dim,
        )  # fmt: skip
    else:
        network = Encoder(
            dim=dim, depth=DEPTH, heads=HEADS, attn_dim_head=dim // HEADS, rotary_pos_emb=True,
            ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=over_width / dim, use_rmsnorm=True,
            attn_flash=True,
        )  # fmt: skip
    if is_compiled:
        network.compile()
    module = TinyRecursiveModel(
        dim=dim, num_tokens=TOKENS, network=network,
        num_refinement_blocks=ROUNDS, num_latent_refinements=THOUGHTS,
    )  # fmt: skip
    # Rounds without gradient lie between them and the loss, which DDP does not put up with.
    for start in module.get_initial():
        start.requires_grad_(False)
    wrapped = DistributedDataParallel(module) if world.size > 1 else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=1.0)
    ema = EMA(
        module, beta=0.999, update_model_with_ema_every=10_000, forward_method_names=("predict",)
    )
    tokens, labels = case.questions()

    def step() -> None:
        outputs, latents = module.get_initial()
        loss, *_ = wrapped(tokens, outputs, latents, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


# -- measuring -------------------------------------------------------------------------------------


PRODUCT = "a matrix product's rate"
"""What a large one reaches in the same turns: the processor's limit."""


def cast(step: Step, precision: Precision, device: str = "cpu") -> Step:
    """Return a step of the others in a precision: under autocast where it is bf16."""

    def under_autocast() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            step()

    return under_autocast


def product_of(width: int, precision: Precision) -> tuple[Step, float]:
    """Return a product of two square matrices, and its floating-point operations."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, found = (torch.randn(width, width).to(dtype) for _ in range(3))

    def product() -> None:
        torch.mm(a, b, out=found)

    return product, 2.0 * width**3


def _timed(step: Callable[[], object], times: int) -> float:
    started_s = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - started_s) / times


def measure(ways: dict[str, Step], group: Group, plan: Plan) -> dict[str, list[float]]:
    """Return seconds of a step, block by block, all ways in turns."""
    first = torch.tensor([_timed(each, 1) for each in ways.values()], dtype=torch.float64)
    mean = group.sum_(first) / group.world.size
    times = [max(1, int(plan.block_s / float(each))) for each in mean]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(plan.blocks):
        for number in range(len(ways))[:: 1 if block % 2 else -1]:
            name = list(ways)[number]
            group.barrier()
            seconds = _timed(ways[name], times[number])
            mean = group.sum_(torch.tensor([seconds], dtype=torch.float64)) / group.world.size
            took[name].append(float(mean))
    return took


def measured(case: Case, plan: Plan, group: Group, *, is_compiled: bool) -> Row:
    """Measure a size."""
    world = group.world
    product, product_flops = product_of(1024, case.precision)
    ways = {
        PRODUCT: product,
        "ours": ours(case, world, is_compiled=is_compiled),
        "plain code": cast(plain(case, world, is_compiled=is_compiled), case.precision),
    }
    with suppress(ImportError):
        of_peer = peer(case, world, is_compiled=is_compiled)
        ways["tiny-recursive-model"] = cast(of_peer, case.precision)
    if is_compiled:
        ways["ours, not compiled"] = ours(case, world)
    with FlopCounterMode(display=False) as counter:
        ours(case, world)()
    samples = case.rows * world.size
    took = measure(ways, group, plan)
    least = counter.get_total_flops() / product_flops  # products' worth in a step
    took[PRODUCT] = [least * seconds for seconds in took[PRODUCT]]
    rates = {name: [samples / seconds for seconds in each] for name, each in took.items()}
    return Row(
        subject=f"training step{', all compiled' if is_compiled else ''}",
        what=f"{case.net}, dim {case.dim}, {case.precision}, {case.positions} positions, "
        f"{case.rows} rows a worker, {world.size} worker(s)",
        unit="samples/s", better="more", ours=rates.pop("ours"),
        limit={PRODUCT: rates.pop(PRODUCT)}, peers=rates,
        goal=None if is_compiled else Goal(1.5),
    )  # fmt: skip


def main(plan: Plan, path: str, *, is_compiled: bool) -> None:
    """Measure all sizes."""
    torch.set_num_threads(1)
    world = World.from_environment(os.environ)
    group = form_group(world, os.environ, 600)
    rows = [measured(case, plan, group, is_compiled=is_compiled) for case in plan.cases]
    if world.is_writer:
        print(f"{world.size} worker(s), 1 thread each, torch {torch.__version__}")
        publish(rows, path)
    group.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--compiled", action="store_true", help="all behind torch.compile")
    asked = given.parse_args()
    plan = PLANS[asked.size]
    if asked.compiled:  # which takes so long that a few more blocks do not matter
        plan = replace(plan, blocks=PLANS["full"].blocks)
    main(plan, asked.rows, is_compiled=asked.compiled)
