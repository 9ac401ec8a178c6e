"""The layers' own gradients and in-place rounds, against torch's and against differences."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trm_dist.model.layers import (
    EPSILON,
    Attention,
    GatedMlp,
    Linear,
    _Gated,
    add_and_norm,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
AXES = pytest.mark.parametrize("axis", [1, 2])


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, change = (torch.randn(3, 40, 96, generator=generator).to(dtype) for _ in range(2))
    return x, change


def plain_norm(x: Tensor, change: Tensor, axis: int) -> Tensor:
    """The norm as torch has it."""
    total = (x + change).transpose(axis, -1)
    return F.rms_norm(total, total.shape[-1:], eps=EPSILON).transpose(axis, -1)


@AXES
@DTYPES
def test_norm_and_its_gradient_are_torchs(axis: int, dtype: torch.dtype) -> None:
    x, change = (each.requires_grad_() for each in pair(dtype))
    slope = pair(dtype)[0].flip(0)
    ours, theirs = add_and_norm(x, change, axis), plain_norm(x, change, axis)
    torch.testing.assert_close(ours, theirs)
    for own, other in zip(
        torch.autograd.grad(ours, (x, change), slope),
        torch.autograd.grad(theirs, (x, change), slope),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@AXES
def test_gradient_of_the_norm_is_that_of_differences(axis: int) -> None:
    x, change = (each[:2, :5, :6].double().requires_grad_() for each in pair())
    assert torch.autograd.gradcheck(lambda *each: add_and_norm(*each, axis), (x, change))


@AXES
def test_gradient_of_the_gate_is_that_of_differences(axis: int) -> None:
    x = pair()[0][:2, :4, :6].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: _Gated.apply(each, axis), (x,))


@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_of_a_map_over_positions_is_that_of_differences(axis: int) -> None:
    x = pair()[0][:3, :4, :6].double().transpose(0, 1 - axis).requires_grad_()
    layer = Linear(4, 5, torch.Generator().manual_seed(1), axis).double()

    def mapped(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(mapped, (x, layer.weight))


@AXES
@DTYPES
def test_gate_and_its_gradient_have_the_bits_of_autograds(axis: int, dtype: torch.dtype) -> None:
    x, slope = pair(dtype)
    x.requires_grad_()
    slope = slope.chunk(2, axis)[0]
    gate, up = x.chunk(2, axis)
    theirs = F.silu(gate) * up
    ours = _Gated.apply(x, axis)
    assert torch.equal(ours, theirs)
    (own,), (other,) = (torch.autograd.grad(each, x, slope) for each in (ours, theirs))
    assert torch.equal(own, other)


@DTYPES
def test_mlp_over_positions_is_the_one_over_the_width_turned(dtype: torch.dtype) -> None:
    x = pair(dtype)[0]
    over_width, over_positions = (
        GatedMlp(40, 64, torch.Generator().manual_seed(1), axis) for axis in (-1, 1)
    )
    torch.testing.assert_close(over_positions(x), over_width(x.mT).mT)


@AXES
@DTYPES
def test_rounds_without_gradient_have_the_bits_of_one_with(axis: int, dtype: torch.dtype) -> None:
    x, change = pair(dtype)
    generator = torch.Generator().manual_seed(1)
    mlp = GatedMlp(x.shape[axis], 64, generator, axis=1 if axis == 1 else -1)
    wanted = add_and_norm(x, change, axis), mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), wanted[1])
        assert torch.equal(add_and_norm(x, change, axis), wanted[0])


def test_bf16_attention_and_its_gradients_are_those_of_fp32_rounded() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        attention = Attention(96, 4, 40, torch.Generator().manual_seed(1))
        x = pair()[0].to(dtype).requires_grad_()
        mixed = attention(x)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        found[dtype] = [mixed, x.grad, *(each.grad for each in attention.parameters())]
    for exact, narrow in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert (narrow.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bf16_attention_needs_no_special_processor(capability: str) -> None:
    code = """
import torch
from trm_dist.model.layers import Attention

x = torch.ones(2, 81, 128, dtype=torch.bfloat16, requires_grad=True)
Attention(128, 4, 81, torch.Generator())(x).sum().backward()
print(x.grad.isfinite().all().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr
