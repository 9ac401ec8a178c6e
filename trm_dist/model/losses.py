"""Loss of a supervision step, per row: cross-entropy over the cells and the halting loss.

Shapes: B rows, L cells, V tokens. A label of IGNORED counts nowhere.

Source: TRM's public code for stablemax and the halting weight; the paper's pseudocode for softmax.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
HALT_WEIGHT = 0.5

LossName = Literal["stablemax", "softmax"]


class RowScores(NamedTuple):
    """What each row of a batch got in one supervision step."""

    loss: Tensor
    """Float [B], with gradient."""
    num_correct: Tensor
    """Cells whose best token is the label, int64 [B]."""
    num_cells: Tensor
    """Cells that count, int64 [B]."""


def score_rows(logits: Tensor, halt: Tensor, labels: Tensor, loss: LossName) -> RowScores:
    """Score one supervision step.

    Args:
        logits: [B, L, V].
        halt: Halting logits, [B]; trained to tell whether the row is solved.
        labels: int64 [B, L], IGNORED where a cell does not count.
        loss: Which cross-entropy.
    """
    counts = labels != IGNORED
    num_cells = counts.sum(-1)
    targets = labels.masked_fill(~counts, 0)
    per_cell = -_log_probability(logits, targets, loss)
    cross_entropy = (per_cell * counts).sum(-1) / num_cells.clamp(min=1)
    num_correct = ((logits.detach().argmax(-1) == labels) & counts).sum(-1)
    is_solved = (num_correct == num_cells).to(halt.dtype)
    halting = F.binary_cross_entropy_with_logits(halt, is_solved, reduction="none")
    return RowScores(cross_entropy + HALT_WEIGHT * halting, num_correct, num_cells)


def _log_probability(logits: Tensor, targets: Tensor, loss: LossName) -> Tensor:
    """Return the log-probability of each target, [B, L], computed in float64 for stablemax."""
    if loss == "softmax":
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    strengths = stablemax_strength(logits.double())
    own = strengths.gather(-1, targets[..., None])[..., 0]
    return (own.log() - strengths.sum(-1).log()).to(logits.dtype)


def stablemax_strength(logits: Tensor) -> Tensor:
    """Return s(v) = v + 1 for v >= 0 and 1 / (1 - v) below, so probabilities never underflow."""
    below = 1 / (1 - logits.clamp(max=0))
    return torch.where(logits < 0, below, logits + 1)
