"""The optimizer step: clip, schedule, AdamW or AdamATan2; a function of the reduced gradient alone.

Source of AdamATan2: arXiv 2407.05872, and the update that TRM's public code uses.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
VARIANTS = {"adamw": "adamw-fused", "adam-atan2": "adam-atan2-foreach"}
"""Which kernels run; another variant may round differently, so it is part of the fingerprint."""

OptimName = Literal["adamw", "adam-atan2"]


def learning_rate(global_step: int, *, lr: float, warmup_steps: int) -> float:
    """Return the rate of the step after `global_step` steps: linear warm-up, then constant."""
    return lr * min(1.0, (global_step + 1) / warmup_steps) if warmup_steps else lr


class AdamAtan2(torch.optim.Optimizer):
    """Adam whose update is an angle, which needs no epsilon and no scale of the gradient.

    With moments m, v after t steps and decoupled weight decay:

        p <- (1 - lr wd) p - lr / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": BETAS, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights; their states hold step, exp_avg and exp_avg_sq."""
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            weights: list[Tensor] = [each for each in group["params"] if each.grad is not None]
            if weights:
                self._change(weights, group)

    def _change(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        gradients = [each.grad for each in weights if each.grad is not None]
        states = [self.state[each] for each in weights]
        first = [each["exp_avg"] for each in states]
        second = [each["exp_avg_sq"] for each in states]
        torch._foreach_add_([each["step"] for each in states], 1.0)
        count = float(states[0]["step"])
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
        scales = torch._foreach_sqrt(second)
        torch._foreach_div_(scales, (1.0 - beta2**count) ** 0.5)
        angles = [torch.atan2(m, scale) for m, scale in zip(first, scales, strict=True)]
        torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(weights, angles, alpha=-lr / (1.0 - beta1**count))


class Optimizer:
    """AdamW or AdamATan2 behind clipping and the schedule."""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        clip: float,
        name: OptimName = "adamw",
    ) -> None:
        self._parameters = list(module.parameters())
        self._lr, self._warmup_steps, self._clip = lr, warmup_steps, clip
        if name == "adamw":
            self._adam: torch.optim.Optimizer = torch.optim.AdamW(
                self._parameters, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True
            )
        else:
            self._adam = AdamAtan2(self._parameters, lr=lr, weight_decay=weight_decay)
        # The moments begin now and not at the first step, so that a state always has one layout.
        for each in self._parameters:
            # The fused kernel counts steps where it runs; AdamAtan2 reads the count on the host.
            device = each.device if name == "adamw" else "cpu"
            self._adam.state[each] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(each),
                "exp_avg_sq": torch.zeros_like(each),
            }

    def clip(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed.

        Returns:
            The norm before, a scalar; not finite when a gradient is not.
        """
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        # A GPU adds up squares in another order where the first does not lie at a multiple of 16
        # bytes, and DDP moves gradients within its buckets after the first step of a start. Memory
        # of their own is aligned.
        own = [each.clone() if each.is_cuda else each for each in gradients]
        norm = torch.nn.utils.get_total_norm(own)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm

    def step(self, global_step: int) -> None:
        """Change the weights with the present gradients, and drop these."""
        rate = self.rate(global_step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad()

    def rate(self, global_step: int) -> float:
        """Return the learning rate of the step after `global_step` steps."""
        return learning_rate(global_step, lr=self._lr, warmup_steps=self._warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the live state."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy moments and counters of a state; rates and decay stay what the settings say."""
        for number, each in enumerate(self._parameters):
            for name, value in state["state"].get(number, {}).items():
                self._adam.state[each][name].copy_(value)

    def scheduler_state_dict(self, global_step: int) -> dict[str, Any]:
        """Return the schedule, a pure function of the optimizer step, at this step."""
        return {
            "name": "warmup-constant",
            "warmup_steps": self._warmup_steps,
            "last_step": global_step,
            "last_lr": self.rate(max(0, global_step - 1)),
        }
