"""Deep supervision, form (A): one batch, up to n_sup supervision steps, rows never dropped.

Every row goes through every step that the batch makes; a finished row's loss is multiplied by 0.
So all workers make the same forward and backward passes, and the batch is left early only when no
row anywhere is active, which the trainer knows from the reduced scores.

This is the small protocol through which the trainer knows TRM: `start`, `step`, `evaluate`.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trm_dist.model.losses import IGNORED, LossName, score_rows
from trm_dist.model.trm import Trm
from trm_dist.randomness import derive_key, random_uniform, random_words

SCORES = ("objective", "loss", "correct", "cells", "exact", "rows", "steps", "active")
"""What a step reports of a shard, as float64 sums. All but the first and the last count each row
once, at the step at which it finishes."""


class Forward(Protocol):
    """The module as it is called for training, behind DDP."""

    def __call__(
        self, tokens: Tensor, output: Tensor, latent: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Trm.forward`."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one shard, B of them."""

    samples: npt.NDArray[np.int64]
    """Sample numbers, [B]."""
    tokens: Tensor
    """int64 [B, L]."""
    labels: Tensor
    """int64 [B, L]."""
    weights: Tensor
    """Float [B]: 1 / rows of the global batch; 0 for rows that only fill up the shard."""
    epoch: int
    puzzles: Tensor | None = None
    """Which puzzle each row belongs to, int64 [B]; None: all to the first."""

    def to(self, device: torch.device) -> Self:
        """Return the rows with their tensors on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            weights=self.weights.to(device),
            puzzles=None if self.puzzles is None else self.puzzles.to(device),
        )


@dataclass(frozen=True, slots=True)
class Carry:
    """What goes from one supervision step of a shard to the next; never across a batch."""

    rows: Rows
    output: Tensor
    latent: Tensor
    is_active: Tensor
    """bool [B]."""
    min_steps: Tensor
    """Steps before which a row may not halt, int64 [B]."""
    step: int
    vectors: Tensor | None = None
    """Of the rows' puzzles, [B, E], as the step that led here read them; with their gradient after
    its backward."""
    was_active: Tensor | None = None
    """Rows that took part in that step, bool [B]."""


class Supervision:
    """TRM as a trainable task."""

    def __init__(
        self, module: Trm, *, n_sup: int, halt_explore: float, loss: LossName, seed: int
    ) -> None:
        self.module = module
        self.max_steps = n_sup
        self._halt_explore = halt_explore
        self._loss = loss
        self._seed = seed

    @property
    def device(self) -> torch.device:
        """Where the model is, and rows must be."""
        return self.module.output_init.device

    def start(self, rows: Rows) -> Carry:
        """Start a shard of a batch."""
        output, latent = self.module.start(len(rows.samples))
        min_steps = torch.from_numpy(self._min_steps(rows)).to(rows.tokens.device)
        return Carry(rows, output, latent, rows.weights > 0, min_steps, 0)

    def step(self, forward: Forward, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """Make one supervision step.

        Args:
            forward: The module, perhaps wrapped.
            carry: From `start` or the step before.

        Returns:
            The shard's part of the objective, to call backward on; its SCORES; the next carry.
        """
        rows, step = carry.rows, carry.step + 1
        vectors = self.module.vectors_of(rows.puzzles, len(rows.tokens))
        logits, halt, output, latent = forward(rows.tokens, carry.output, carry.latent, vectors)
        scores = score_rows(logits, halt, rows.labels, self._loss)
        objective = (scores.loss * rows.weights * carry.is_active).sum()
        may_halt = (halt.detach() > 0) & (carry.min_steps <= step)
        ends = carry.is_active & (may_halt | (step == self.max_steps))
        is_active = carry.is_active & ~ends
        num_ends = ends.sum()
        table = torch.stack(
            [
                objective.detach().double(),
                (scores.loss.detach().double() * ends).sum(),
                (scores.num_correct * ends).sum(),
                (scores.num_cells * ends).sum(),
                ((scores.num_correct == scores.num_cells) & ends).sum(),
                num_ends,
                num_ends * step,
                is_active.sum(),
            ]
        )
        following = Carry(
            rows, output, latent, is_active, carry.min_steps, step, vectors, carry.is_active
        )
        return objective, table, following

    @torch.no_grad()
    def answer(self, tokens: Tensor, puzzles: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Answer questions as the paper evaluates: after all n_sup steps.

        Args:
            tokens: int64 [B, L].
            puzzles: Which puzzle each belongs to, int64 [B]; None: all to the first.

        Returns:
            The answers, int64 [B, L], and the steps at which the halting head would have stopped,
            int64 [B].
        """
        output, latent = self.module.start(len(tokens))
        steps = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        has_halted = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        vectors = self.module.vectors_of(puzzles, len(tokens))
        for _ in range(self.max_steps):
            logits, halt, output, latent = self.module(tokens, output, latent, vectors)
            steps += ~has_halted
            has_halted |= halt > 0
        return logits.argmax(-1), steps

    def evaluate(
        self, tokens: Tensor, labels: Tensor, num_rows: int, puzzles: Tensor | None = None
    ) -> Tensor:
        """Answer questions and compare.

        Args:
            tokens: int64 [B, L].
            labels: int64 [B, L].
            num_rows: How many of the first rows count; the others fill up.
            puzzles: Which puzzle each belongs to, int64 [B]; None: all to the first.

        Returns:
            int64 [5]: cells correct, cells, rows exact, rows, and the sum of the steps at which
            the halting head would have stopped.
        """
        answers, steps = self.answer(tokens, puzzles)
        counts = labels != IGNORED
        correct = ((answers == labels) & counts).sum(-1)[:num_rows]
        cells = counts.sum(-1)[:num_rows]
        exact = (correct == cells).sum()
        num = torch.tensor(num_rows, device=exact.device)
        return torch.stack([correct.sum(), cells.sum(), exact, num, steps[:num_rows].sum()])

    def _min_steps(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Draw for each sample whether it explores, and how long; the same at any world size."""
        explores = random_uniform(derive_key("explore", self._seed, rows.epoch), rows.samples)
        words = random_words(derive_key("min-steps", self._seed, rows.epoch), rows.samples)
        if self.max_steps < 2:
            return np.ones(len(rows.samples), dtype=np.int64)
        drawn = 2 + (words % np.uint64(self.max_steps - 1)).astype(np.int64)
        return np.where(explores < self._halt_explore, drawn, 1)
