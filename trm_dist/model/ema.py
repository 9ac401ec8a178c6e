"""Exponential moving average of the weights, on every rank, with its own counter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copies of a module's parameters.

    The decay of update n is min(decay, (1 + n) / (10 + n)): short runs are not held back by the
    weights they started from. The counter is part of the state, so a resumed run goes on averaging.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._parameters = dict(module.named_parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module's present weights; after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current: list[Tensor] = list(self._parameters.values())
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the module's place for the duration of a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Return the live averages and the counter."""
        return {"decay": self.decay, "num_updates": self.num_updates, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy averages and counter of a state; the decay stays what the settings say."""
        self.num_updates = state["num_updates"]
        stored: dict[str, Tensor] = state["weights"]
        for name, average in self.weights.items():
            average.copy_(stored[name])

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
