"""Which rows a shard of a batch has: arithmetic on the order, the same on every worker."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trm_dist.config import DataConfig
from trm_dist.data.dataset import Dataset
from trm_dist.data.order import samples_at
from trm_dist.model.supervision import Rows
from trm_dist.progress import Progress


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of a batch over all workers, in order."""

    samples: npt.NDArray[np.int64]
    epoch: int


class Feed:
    """The training set, cut into batches and shards."""

    def __init__(self, dataset: Dataset, config: DataConfig) -> None:
        self._dataset = dataset
        self._seed = config.seed
        self._batch_size = config.batch_size
        self.rows_per_shard = config.batch_size // config.shards

    def batch(self, at: Progress) -> GlobalBatch:
        """Return the batch that follows a boundary; the last of an epoch may be smaller."""
        num_samples = self._dataset.num_samples
        start = at.batch_idx * self._batch_size
        positions = np.arange(start, min(start + self._batch_size, num_samples))
        samples = samples_at(positions, num_samples=num_samples, seed=self._seed, epoch=at.epoch)
        return GlobalBatch(samples, at.epoch)

    def rows(self, batch: GlobalBatch, shard: int) -> Rows:
        """Return a shard of a batch; always of one size, rows past the end weigh nothing."""
        places = np.arange(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)
        is_real = places < len(batch.samples)
        samples = batch.samples[np.where(is_real, places, 0)]
        inputs, labels = self._dataset.rows(samples)
        weights = torch.from_numpy(is_real).float() / len(batch.samples)
        tokens, targets = torch.from_numpy(inputs), torch.from_numpy(labels)
        return Rows(samples, tokens, targets, weights, batch.epoch, self._puzzles_of(samples))

    def puzzles(self, batch: GlobalBatch) -> torch.Tensor:
        """Return the puzzle of every row of a batch, int64 [batch size]; see `rows`."""
        places = np.arange(self._batch_size)
        return self._puzzles_of(batch.samples[np.where(places < len(batch.samples), places, 0)])

    def _puzzles_of(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(self._dataset.puzzles_of(samples))
