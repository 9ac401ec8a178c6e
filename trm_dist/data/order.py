"""The order of samples: a permutation that is computed, never stored.

A Feistel network permutes the smallest square power of two that holds all samples, and a position
that falls outside is permuted again until it falls inside (cycle walking), so the map from position
to sample is a permutation of exactly `num_samples` values. Any position of any epoch costs the same
time and no memory, at 10^10 samples as at ten: resume never reads, skips or replays anything.
"""

import numpy as np
import numpy.typing as npt

from trm_dist.randomness import Words, derive_key, random_words

_ROUNDS = 6


def samples_at(
    positions: npt.ArrayLike, *, num_samples: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return which sample stands at each position of one epoch's order.

    Args:
        positions: Positions in the epoch, each in [0, num_samples); any shape.
        num_samples: Samples in the data set.
        seed: Seed of the run.
        epoch: Epoch, from 1; each has an order of its own.

    Returns:
        Sample numbers, int64, of the shape of `positions`.
    """
    values = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
    if values.size and int(values.max()) >= num_samples:
        raise IndexError(f"position {int(values.max())} is outside of {num_samples} samples")
    half_bits = max(1, -(-(num_samples - 1).bit_length() // 2))
    keys = [derive_key("order", seed, epoch, round_) for round_ in range(_ROUNDS)]
    values = _feistel(values, half_bits, keys)
    while (outside := values >= np.uint64(num_samples)).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64).reshape(np.shape(positions))


def _feistel(values: Words, half_bits: int, keys: list[int]) -> Words:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (random_words(key, right) & mask)
    return (left << shift) | right
