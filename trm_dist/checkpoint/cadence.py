"""How often a memory snapshot is taken: after every batch, or as often as its cost allows."""

import logging
import math
import statistics
from typing import Literal

logger = logging.getLogger(__name__)

MOST_COST = 0.01
"""Share of the training time that --snapshot-every auto spends on copies."""

_MEASURED = 8


class Cadence:
    """Every so many batches; with "auto" the number follows from the first batches."""

    def __init__(self, every: int | Literal["auto"]) -> None:
        self.every = 1 if every == "auto" else every
        self._measured: list[tuple[float, float]] | None = [] if every == "auto" else None

    def is_due(self, batch_count: int) -> bool:
        """Tell whether the state after so many batches is captured."""
        return batch_count % self.every == 0

    def measure(self, *, copy_s: float, batch_s: float) -> None:
        """Take in what a batch and its copy took; "auto" settles after a few."""
        if self._measured is None:
            return
        self._measured.append((copy_s, batch_s))
        if len(self._measured) < _MEASURED:
            return
        copy, batch = (statistics.median(each) for each in zip(*self._measured, strict=True))
        self.every = max(1, math.ceil(copy / (MOST_COST * batch)))
        self._measured = None
        logger.info(
            "a memory snapshot takes %.2f ms and a batch %.0f ms: one after every %d batch(es), "
            "so a worker that is killed costs up to %d finished batch(es)",
            1e3 * copy,
            1e3 * batch,
            self.every,
            self.every - 1,
        )
