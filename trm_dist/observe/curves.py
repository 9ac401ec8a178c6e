"""The points of the run's curves, which travel with its state.

A snapshot that holds batch k holds the points up to k, wherever it is taken: to another worker, to
another node, into a checkpoint. So no restart loses a point or makes one twice; whoever commits a
snapshot writes event files of what is new in it. Of each curve the newest points are kept, enough
for a store that is away for a while.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trm_dist import events

NUM_BATCHES = 8192
"""Batches that may pass between two commits until the oldest points are lost."""
NUM_EVALUATIONS = 256

_TRAIN = ("loss", "token_accuracy", "exact_accuracy", "mean_steps", "lr", "seconds")
_EVALUATION = ("token_accuracy", "exact_accuracy", "mean_steps", "seconds")

NUM_BYTES = 8 * (NUM_BATCHES * (2 + len(_TRAIN)) + NUM_EVALUATIONS * (2 + len(_EVALUATION)))
"""What a snapshot grows by."""


class Series:
    """A table of points: batch count (0: none), seconds since the epoch, a value for each tag."""

    def __init__(self, name: str, fields: tuple[str, ...], capacity: int) -> None:
        self._tags = [f"{name}/{each}" for each in fields]
        self._fields = fields
        self._points = torch.zeros(capacity, 2 + len(fields), dtype=torch.float64)
        self._counts: dict[int, int] = {}
        """Where each batch count stands, the oldest first."""

    def add(self, event: events.Event, at_s: float) -> None:
        """Take the point of a batch count, unless it is there; the oldest makes room."""
        batch_count = event.progress.batch_count
        if self.has(batch_count):
            return
        place = len(self._counts)
        if place == len(self._points):
            place = self._counts.pop(next(iter(self._counts)))
        values = [float(getattr(event, each)) for each in self._fields]
        self._points[place] = torch.tensor([batch_count, at_s, *values], dtype=torch.float64)
        self._counts[batch_count] = place

    def has(self, batch_count: int) -> bool:
        """Tell whether there is a point of a batch count."""
        return batch_count in self._counts

    def state_dict(self) -> dict[str, Any]:
        """Return tags and points; the points change with the next one."""
        return {"tags": self._tags, "points": self._points}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over points; those of another version, with other tags, are left."""
        points: Tensor = state["points"]
        if state["tags"] == self._tags and points.shape == self._points.shape:
            self._points.copy_(points)
            found = sorted((int(each), place) for place, each in enumerate(points[:, 0].tolist()))
            self._counts = {count: place for count, place in found if count}


class Curves:
    """The curves of a run: its batches and its evaluations."""

    def __init__(
        self, clock: Callable[[], float] = time.time, num_batches: int = NUM_BATCHES
    ) -> None:
        """Begin with no point.

        Args:
            clock: Seconds since the epoch.
            num_batches: Whose points are kept.
        """
        self._clock = clock
        self._train = Series("train", _TRAIN, num_batches)
        self._evaluation = Series("evaluation", _EVALUATION, NUM_EVALUATIONS)

    def add(self, event: events.Batch | events.Evaluated) -> None:
        """Take the point of an event."""
        is_batch = isinstance(event, events.Batch)
        (self._train if is_batch else self._evaluation).add(event, self._clock())

    def has_evaluation(self, batch_count: int) -> bool:
        """Tell whether the evaluation after so many batches is known."""
        return self._evaluation.has(batch_count)

    def state_dict(self) -> dict[str, Any]:
        """Return all series by name, as they go into a snapshot."""
        return {"train": self._train.state_dict(), "evaluation": self._evaluation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the points of a snapshot."""
        self._train.load_state_dict(state["train"])
        self._evaluation.load_state_dict(state["evaluation"])
