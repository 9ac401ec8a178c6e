"""One step of SignSGD on the vectors of a batch's puzzles, from gradients of single rows.

The gradient of a puzzle's vector is the sum over its rows in the batch. Every row has a place of
its own in a table, which a worker fills with the rows it computes; the sum of all workers' tables
is exact, as other entries are zero, and the rows of a puzzle are added up in the order of the
batch. So which worker computes which row changes no bit.

    v <- (1 - lr wd) v - lr sign(sum of the gradients of its active rows)

A puzzle without an active row in the batch keeps its vector; its weights are not decayed either.

Source: TRM's public code (puzzle embeddings with SignSGD); formulas only.
"""

import torch
from torch import Tensor

from trm_dist.model.optim import learning_rate


class PuzzleOptimizer:
    """Collects the gradients of a supervision step and changes the vectors."""

    def __init__(
        self, vectors: Tensor, *, batch_size: int, lr: float, warmup_steps: int,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """Prepare a table.

        Args:
            vectors: Of all puzzles, [puzzles, E]; changed in place.
            batch_size: Rows of a global batch.
            lr: Learning rate after the warm-up.
            warmup_steps: Optimizer steps over which it rises.
            weight_decay: Decoupled, at each step of a puzzle.
        """
        self._vectors = vectors
        self._lr, self._warmup_steps, self._weight_decay = lr, warmup_steps, weight_decay
        self._puzzles = vectors.new_zeros(batch_size, dtype=torch.int64)
        # The last column tells which rows were active.
        self._table = vectors.new_zeros(batch_size, vectors.shape[1] + 1)

    def begin(self, puzzles: Tensor) -> Tensor:
        """Begin a supervision step.

        Args:
            puzzles: Of each row of the global batch, int64 [batch_size].

        Returns:
            The table, to be added up over all workers before `step`.
        """
        self._puzzles = puzzles.to(self._table.device)
        return self._table.zero_()

    def take(self, first: int, gradients: Tensor, is_active: Tensor) -> None:
        """Take the gradients of some rows.

        Args:
            first: Place of the first one in the batch.
            gradients: [B, E].
            is_active: Which rows took part, bool [B].
        """
        rows = self._table[first : first + len(gradients)]
        rows[:, :-1] += gradients  # and no copy: this turns -0 into 0, as sums over workers do
        rows[:, -1] += is_active

    def is_finite(self) -> bool:
        """Tell whether all gradients are."""
        return bool(self._table.isfinite().all())

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """Change the vectors of the puzzles with active rows, in the step after `global_step`."""
        is_active = self._table[:, -1] > 0
        puzzles, places = torch.unique(self._puzzles[is_active], return_inverse=True)
        sums = self._table.new_zeros(len(puzzles), self._vectors.shape[1])
        sums.index_add_(0, places, self._table[is_active, :-1])
        lr = learning_rate(global_step, lr=self._lr, warmup_steps=self._warmup_steps)
        decayed = self._vectors[puzzles] * (1.0 - lr * self._weight_decay)
        self._vectors[puzzles] = decayed - lr * sums.sign()
