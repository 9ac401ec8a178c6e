"""What the compiler is given; what it makes of it is tested by elastic/test_compiled.py."""

import pytest
import torch
from torch import Tensor

from trm_dist.model.kernels import compile_network
from trm_dist.model.trm import Precision, Shape, Trm
from trm_dist.train import pin_numerics

# torch's compiler uses what torch has deprecated, and looks where torch warns to look.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")

SIZES = {
    "dim": 32, "depth": 2, "heads": 2, "seq_len": 16, "prefix_len": 1, "num_tokens": 7,
    "expansion": 4.0, "h_cycles": 2, "l_cycles": 2,
}  # fmt: skip
TOKENS = torch.arange(48).view(3, 16) % 7


def make(net: str, precision: Precision = "fp32", *, is_compiled: bool) -> Trm:
    module = Trm(Shape(net=net, **SIZES), seed=0, precision=precision)  # type: ignore[arg-type]
    if is_compiled:
        compile_network(module, "aot_eager")
    return module


def results(module: Trm) -> list[Tensor]:
    """Of a forward and backward: logits, both states, and all gradients."""
    logits, _, output, latent = module(TOKENS, *module.start(3))
    logits.square().sum().backward()
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return [each.detach().float() for each in (logits, output, latent, *gradients)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


@pytest.mark.parametrize("net", ["mlp", "attn"])
def test_compiled_formulas_are_those_of_the_layers(net: str) -> None:
    pin_numerics(1)
    expected = results(make(net, is_compiled=False))
    assert max(errors(results(make(net, is_compiled=True)), expected)) < 1e-5
    # In bf16 they come about as near: sums and rotations are in float32 here, too.
    eager = errors(results(make(net, "bf16", is_compiled=False)), expected)
    compiled = errors(results(make(net, "bf16", is_compiled=True)), expected)
    assert sum(compiled) < 1.5 * sum(eager)


def test_evaluation_goes_on_as_before() -> None:
    pin_numerics(1)
    modules = [make("mlp", "bf16", is_compiled=each).eval() for each in (False, True)]
    with torch.no_grad():
        one, other = (each(TOKENS, *each.start(3))[0] for each in modules)
    assert torch.equal(one, other)
