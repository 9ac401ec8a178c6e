"""The optimizer step: clip, schedule, AdamW; a deterministic function of the reduced gradient."""

from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
VARIANT = "adamw-fused"
"""Which kernels run; another variant may round differently, so it is part of the fingerprint."""


def learning_rate(global_step: int, *, lr: float, warmup_steps: int) -> float:
    """Return the rate of the step after `global_step` steps: linear warm-up, then constant."""
    return lr * min(1.0, (global_step + 1) / warmup_steps) if warmup_steps else lr


class Optimizer:
    """AdamW behind clipping and the schedule."""

    def __init__(
        self, module: nn.Module, *, lr: float, warmup_steps: int, weight_decay: float, clip: float
    ) -> None:
        self._parameters = list(module.parameters())
        self._lr, self._warmup_steps, self._clip = lr, warmup_steps, clip
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True
        )
        # The moments begin now and not at the first step, so that a state always has one layout.
        for each in self._parameters:
            self._adamw.state[each] = {
                "step": torch.zeros((), dtype=torch.float32, device=each.device),
                "exp_avg": torch.zeros_like(each),
                "exp_avg_sq": torch.zeros_like(each),
            }

    def clip(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed.

        Returns:
            The norm before, a scalar; not finite when a gradient is not.
        """
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm

    def step(self, global_step: int) -> None:
        """Change the weights with the present gradients, and drop these."""
        rate = self.rate(global_step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad()

    def rate(self, global_step: int) -> float:
        """Return the learning rate of the step after `global_step` steps."""
        return learning_rate(global_step, lr=self._lr, warmup_steps=self._warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's live state."""
        return self._adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy moments and counters of a state; rates and decay stay what the settings say."""
        for number, each in enumerate(self._parameters):
            for name, value in state["state"].get(number, {}).items():
                self._adamw.state[each][name].copy_(value)

    def scheduler_state_dict(self, global_step: int) -> dict[str, Any]:
        """Return the schedule, a pure function of the optimizer step, at this step."""
        return {
            "name": "warmup-constant",
            "warmup_steps": self._warmup_steps,
            "last_step": global_step,
            "last_lr": self.rate(max(0, global_step - 1)),
        }
