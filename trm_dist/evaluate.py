"""Evaluation, spread over the workers; sums of whole numbers, so exact at every world size."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_dist.data.dataset import Dataset
from trm_dist.elastic.world import Group
from trm_dist.model.supervision import Supervision


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a data set came to."""

    token_accuracy: float
    exact_accuracy: float
    mean_steps: float
    num_samples: int


def evaluate(
    task: Supervision, dataset: Dataset, group: Group, *, num_rows: int,
    on_step: Callable[[], object],
) -> Evaluation:  # fmt: skip
    """Evaluate the task's present weights on a whole data set; all workers call it.

    Args:
        task: The model.
        dataset: What to answer.
        group: The workers, who take chunks in turn.
        num_rows: Rows of a chunk; kernels may round differently at another number.
        on_step: Called after each chunk.
    """
    totals, world = torch.zeros(5, dtype=torch.int64), group.world
    task.module.eval()
    for start in range(world.rank * num_rows, dataset.num_samples, world.size * num_rows):
        totals += _evaluate_chunk(task, dataset, start, num_rows)
        on_step()
    task.module.train()
    correct, cells, exact, rows, steps = group.sum_(totals).tolist()
    return Evaluation(correct / cells, exact / rows, steps / rows, rows)


def _evaluate_chunk(task: Supervision, dataset: Dataset, start: int, num_rows: int) -> Tensor:
    places = np.arange(start, start + num_rows)
    samples = np.minimum(places, dataset.num_samples - 1)
    inputs, labels, puzzles = (
        torch.from_numpy(each).to(task.device)
        for each in (*dataset.rows(samples), dataset.puzzles_of(samples))
    )
    num_real = min(num_rows, dataset.num_samples - start)
    return task.evaluate(inputs, labels, num_real, puzzles).cpu()
