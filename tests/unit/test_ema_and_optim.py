import pytest
import torch
from torch import nn

from trm_dist.model.ema import Ema
from trm_dist.model.optim import Optimizer, learning_rate


def test_average_is_that_of_a_plain_loop() -> None:
    module = nn.Linear(3, 2).double()
    ema = Ema(module, 0.9)
    wanted = module.weight.detach().clone()
    for step in range(1, 60):
        with torch.no_grad():
            module.weight.add_(torch.full((2, 3), 0.1 * step))
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * module.weight.detach()
        ema.update()
    torch.testing.assert_close(ema.weights["weight"], wanted)


def test_averages_take_the_place_and_give_it_back_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1)
    live, average = module.weight.detach().clone(), ema.weights["weight"].clone()
    inside = []

    def fail_inside() -> None:
        with ema.averaged():
            inside.append(module.weight.detach().clone())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(inside[0], average)
    assert torch.equal(module.weight, live)
    assert torch.equal(ema.weights["weight"], average)


def test_average_goes_on_after_a_restore() -> None:
    module = nn.Linear(2, 2)
    ema, other = Ema(module, 0.9), Ema(module, 0.9)
    for _ in range(5):
        with torch.no_grad():
            module.weight.mul_(1.1)
        ema.update()
    other.load_state_dict(ema.state_dict())
    ema.update()
    other.update()
    assert other.num_updates == 6
    assert torch.equal(ema.weights["weight"], other.weights["weight"])


@pytest.mark.parametrize(
    ("step", "warmup", "rate"), [(0, 4, 0.25), (2, 4, 0.75), (3, 4, 1.0), (900, 4, 1.0), (0, 0, 1)]
)
def test_rate_rises_in_a_line_and_stays(step: int, warmup: int, rate: float) -> None:
    assert learning_rate(step, lr=1.0, warmup_steps=warmup) == rate


def optimizer(module: nn.Module, lr: float = 0.1, clip: float = 1.0) -> Optimizer:
    return Optimizer(module, lr=lr, warmup_steps=0, weight_decay=0.0, clip=clip)


def test_gradient_is_scaled_down_to_the_norm_and_the_norm_returned() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.grad = torch.tensor([[8.0]])
    assert optimizer(module).clip().item() == 8
    assert module.weight.grad.item() == pytest.approx(1)
    module.weight.grad = torch.tensor([[8.0]])
    assert optimizer(module, clip=0).clip().item() == 8
    assert module.weight.grad.item() == 8


def test_restore_takes_moments_and_keeps_the_rate_of_the_settings() -> None:
    module = nn.Linear(1, 1, bias=False)
    first, second = optimizer(module, lr=0.1), optimizer(module, lr=0.5)
    module.weight.grad = torch.ones(1, 1)
    first.step(0)
    second.load_state_dict(first.state_dict())
    before = module.weight.item()
    module.weight.grad = torch.ones(1, 1)
    second.step(1)
    assert second.state_dict()["state"][0]["step"] == 2
    assert before - module.weight.item() == pytest.approx(0.5, rel=1e-5)


def test_angle_update_goes_on_after_a_restore() -> None:
    def stepper(module: nn.Module) -> Optimizer:
        return Optimizer(
            module, lr=0.1, warmup_steps=0, weight_decay=0.1, clip=1, name="adam-atan2"
        )  # fmt: skip

    module = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    first, second = stepper(module), stepper(other)

    def step(count: int, *pairs: tuple[nn.Module, Optimizer]) -> None:
        for target, each in pairs:
            for parameter in target.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * count)
            each.clip()
            each.step(count)

    for count in range(4):
        step(count, (module, first))
    other.load_state_dict(module.state_dict())
    second.load_state_dict(first.state_dict())
    for count in range(4, 7):
        step(count, (module, first), (other, second))
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.bias, other.bias)
