import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trm_dist.model.layers import EPSILON, GatedMlp, add_and_norm

ORDERS = [(1, False), (2, False), (2, True)]
"""Which axis is normed, and whether its squares are added up in turned memory."""


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, change = (torch.randn(3, 37, 96, generator=generator).to(dtype) for _ in range(2))
    return x, change


def plain(x: Tensor, change: Tensor, dim: int, is_turned: bool) -> Tensor:
    """The norm as torch has it, over the axis in the place where its sums run."""
    total = x + change
    if is_turned:
        total = total.mT.contiguous().mT
    total = total.transpose(dim, -1)
    exact = total.float() if total.dtype == torch.bfloat16 else total
    normed = F.rms_norm(exact, total.shape[-1:], eps=EPSILON).to(total.dtype)
    return normed.transpose(dim, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "is_turned"), ORDERS)
def test_norm_has_the_bits_of_the_plain_one(dim: int, is_turned: bool, dtype: torch.dtype) -> None:
    x, change = (each.requires_grad_() for each in pair(dtype))
    slope = pair(dtype)[0].flip(0)
    ours = add_and_norm(x, change, dim, is_turned=is_turned)
    theirs = plain(x, change, dim, is_turned)
    assert torch.equal(ours, theirs)
    for own, other in zip(
        torch.autograd.grad(ours, (x, change), slope),
        torch.autograd.grad(theirs, (x, change), slope),
        strict=True,
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize(("dim", "is_turned"), ORDERS)
def test_gradient_of_the_norm_is_that_of_differences(dim: int, is_turned: bool) -> None:
    x, change = (each[:2, :5, :6].double().requires_grad_() for each in pair())
    assert torch.autograd.gradcheck(
        lambda *each: add_and_norm(*each, dim, is_turned=is_turned), (x, change)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "is_turned"), ORDERS)
def test_rounds_without_gradient_have_the_bits_of_one_with(
    dim: int, is_turned: bool, dtype: torch.dtype
) -> None:
    x, change = pair(dtype)
    mlp = GatedMlp(96, 64, torch.Generator().manual_seed(1))
    wanted = add_and_norm(x, change, dim, is_turned=is_turned), mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), wanted[1])
        assert torch.equal(add_and_norm(x, change, dim, is_turned=is_turned), wanted[0])
