"""The blocks of TRM's network: RMS norm without gain, gated MLPs, attention with rotary positions.

Every layer is free of biases and normalises after the residual sum (post-norm). Weights are
float32, activations as precise as what comes in, and norms and rotations computed in float32.
Shapes: B rows, S positions, D width, H heads.

Source: arXiv 2510.04871 and its public code; formulas only.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5
ROTARY_BASE = 10_000.0


def add_and_norm(x: Tensor, change: Tensor, axis: int) -> Tensor:
    """Add, and divide by the root mean square over an axis; no learned gain.

    Memory keeps the order that x has. Without gradient x is written over, since nothing else is
    large in a round.

    Args:
        x: Of three axes.
        change: What is added, of the same shape.
        axis: Of the mean.
    """
    if torch.compiler.is_compiling():  # one kernel comes of it
        exact = widened(x) + widened(change)
        return (exact * _inverse_rms(exact, axis)).to(x.dtype)
    is_recording = torch.is_grad_enabled()
    x = x + change if is_recording else x.add_(change)
    if x.is_cuda:  # one kernel there, which wants its axis last
        turned = x.transpose(axis, -1)
        normed = F.rms_norm(widened(turned), turned.shape[-1:], eps=EPSILON).to(x.dtype)
        return normed.transpose(axis, -1)
    exact = widened(x)
    if is_recording:
        return _RmsNorm.apply(exact, axis).to(x.dtype)  # type: ignore[no-any-return, no-untyped-call]
    return exact.mul_(_inverse_rms(exact, axis)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """The norm, its gradient in fewer passes over x than autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        scale = _inverse_rms(x, axis)
        ctx.axis = axis
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        slope = (gradient * x).sum(ctx.axis, keepdim=True).div_(-x.shape[ctx.axis])
        return (gradient * scale).add_(x * slope.mul_(scale.pow(3))), None


def _inverse_rms(x: Tensor, axis: int) -> Tensor:
    """Return one over the root mean square over an axis, which stays with size 1."""
    return (x * x).mean(axis, keepdim=True).add_(EPSILON).rsqrt_()


class _Gated(torch.autograd.Function):
    """silu(gate) * up, its gradient written where it belongs instead of put together."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, axis: int) -> Tensor:
        gate, up = gate_up.chunk(2, axis)
        opened = F.silu(gate)
        ctx.axis = axis
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, ctx.axis)
        slopes = torch.empty_like(gate_up)
        of_gate, of_up = slopes.chunk(2, ctx.axis)
        torch.mul(gradient, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return slopes, None


def widened(x: Tensor) -> Tensor:
    """Return bfloat16 as float32, and anything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def inner_width(width: int, *, expansion: float, multiple: int) -> int:
    """Return the inner width of a gated MLP: two thirds of the expansion, rounded up."""
    return -(-round(expansion * width * 2 / 3) // multiple) * multiple


class Linear(nn.Module):
    """A linear map without bias, weights from a normal of std 1/sqrt(in) cut at two deviations."""

    def __init__(
        self, num_in: int, num_out: int, generator: torch.Generator, axis: int = -1
    ) -> None:
        """Make a map over an axis: the last one, or 0 or 1 of three."""
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((num_out, num_in), num_in**-0.5, generator))
        self._axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Map num_in to num_out along the axis; x need not be turned in memory for it."""
        weight = self.weight.to(x.dtype)
        if self._axis == -1:
            return F.linear(x, weight)
        if self._axis == 0:
            return (weight @ x.flatten(1)).view(-1, *x.shape[1:])
        if not torch.compiler.is_compiling() and not x.is_cuda:
            return _MixedByRow.apply(weight, x)  # type: ignore[no-any-return, no-untyped-call]
        return torch.bmm(weight.expand(len(x), -1, -1), x)


class _MixedByRow(torch.autograd.Function):
    """A weight by each row; its gradient is added up within the products, not kept by row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return torch.bmm(weight.expand(len(x), -1, -1), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        of_weight = torch.addbmm(weight, gradient, x.mT, beta=0)
        return of_weight, torch.bmm(weight.mT.expand(len(x), -1, -1), gradient)


class GatedMlp(nn.Module):
    """SwiGLU over an axis, the last one or 0 or 1 of three: down(silu(gate) * up)."""

    def __init__(self, width: int, inner: int, generator: torch.Generator, axis: int = -1) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * inner, generator, axis)
        self.down = Linear(inner, width, generator, axis)
        self._axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Map x to its own shape."""
        gate_up = self.gate_up(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.down(_Gated.apply(gate_up, self._axis))  # type: ignore[no-any-return, no-untyped-call]
        gate, up = gate_up.chunk(2, self._axis)
        return self.down(F.silu(gate).mul_(up))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Full (not causal) self-attention with rotary positions on queries and keys."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, positions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, generator)
        self.out = Linear(width, width, generator)
        cos, sin = rotary_tables(positions, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        by_heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if not x.is_cuda:  # torch's in bfloat16 needs AVX-512 there, and is ten times as slow
            by_heads = widened(by_heads)
        query_key, value = by_heads.split((2, 1))  # [2, B, H, S, D/H] and [1, B, H, S, D/H]
        query, key = rotate(query_key, self.cos, self.sin)
        mixed = F.scaled_dot_product_attention(query, key, value.squeeze(0)).to(x.dtype)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    """A gated MLP over the positions, then one over the width."""

    def __init__(
        self,
        positions: int,
        width: int,
        *,
        positions_first: bool,
        expansion: float,
        multiple: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        inner = inner_width(positions, expansion=expansion, multiple=multiple)
        self._positions_axis = 0 if positions_first else 1
        self.over_positions = GatedMlp(positions, inner, generator, self._positions_axis)
        inner = inner_width(width, expansion=expansion, multiple=multiple)
        self.over_width = GatedMlp(width, inner, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, [S, B, D] or [B, S, D], to its own shape; without gradient it is written over."""
        x = add_and_norm(x, self.over_positions(x), self._positions_axis)
        return add_and_norm(x, self.over_width(x), 2)


class AttentionBlock(nn.Module):
    """Self-attention over the positions, then a gated MLP over the width."""

    def __init__(
        self,
        positions: int,
        width: int,
        *,
        heads: int,
        expansion: float,
        multiple: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, positions, generator)
        inner = inner_width(width, expansion=expansion, multiple=multiple)
        self.over_width = GatedMlp(width, inner, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]; without gradient x is written over."""
        x = add_and_norm(x, self.attention(x), 2)
        return add_and_norm(x, self.over_width(x), 2)


def rotary_tables(positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each [positions, head_width], in float32."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * ROTARY_BASE**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + width/2) of the last axis by its position's angle.

    Args:
        x: [..., S, D/H].
        cos: Of the angles, [S, D/H], its two halves alike.
        sin: The same.
    """
    if torch.compiler.is_compiling():
        exact = widened(x)
        first, second = exact.chunk(2, dim=-1)
        return (exact * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Its gradient turns back, in as few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = widened(x)
    first, second = exact.chunk(2, dim=-1)
    turned = exact * cos
    new_first, new_second = turned.chunk(2, dim=-1)
    half = sin.chunk(2, dim=-1)[0]
    new_first.addcmul_(second, half, value=-1)
    new_second.addcmul_(first, half)
    return turned.to(x.dtype)


def truncated_normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Draw from a normal cut at two deviations and widened so that its own deviation is `std`."""
    # The deviation of a standard normal that is cut at +-2.
    density = math.exp(-2.0) / math.sqrt(2 * math.pi)
    inside = math.erf(2 / math.sqrt(2))
    scale = std / math.sqrt(1 - 4 * density / inside)
    drawn = torch.empty(shape)
    if drawn.is_meta:  # there is nothing to draw, and older torch imports its compiler for it
        return drawn
    nn.init.trunc_normal_(drawn, std=scale, a=-2 * scale, b=2 * scale, generator=generator)
    return drawn
