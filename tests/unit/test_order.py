"""The order of samples: a permutation that nobody stores."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from trm_dist.data.order import samples_at

HUGE = 10**10


def whole(num_samples: int, *, seed: int = 0, epoch: int = 1) -> npt.NDArray[np.int64]:
    return samples_at(np.arange(num_samples), num_samples=num_samples, seed=seed, epoch=epoch)


@pytest.mark.parametrize("num_samples", [*range(1, 41), 1000, 4096, 5000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 2), (7, 3)])
def test_order_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = whole(num_samples, seed=seed, epoch=epoch)

    assert sorted(order.tolist()) == list(range(num_samples))


@pytest.mark.parametrize(
    ("positions", "num_samples", "seed", "epoch", "samples"),
    [
        (range(10), 10, 0, 1, [4, 3, 8, 5, 7, 9, 2, 6, 0, 1]),
        (range(10), 10, 0, 2, [2, 7, 9, 5, 8, 6, 0, 3, 4, 1]),
        ([0, 1, 2, 999], 1000, 3, 7, [319, 427, 126, 86]),
        ([0, 1_000_000, HUGE - 1], HUGE, 0, 1, [2673806547, 4941342189, 623606784]),
    ],
)
def test_order_is_golden(
    positions: npt.ArrayLike, num_samples: int, seed: int, epoch: int, samples: list[int]
) -> None:
    found = samples_at(positions, num_samples=num_samples, seed=seed, epoch=epoch)

    assert found.tolist() == samples


def test_order_differs_in_every_epoch() -> None:
    orders = {whole(50, epoch=epoch).tobytes() for epoch in range(1, 41)}

    assert len(orders) == 40


def test_order_differs_for_every_seed() -> None:
    orders = {whole(50, seed=seed).tobytes() for seed in range(40)}

    assert len(orders) == 40


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 8), (7, 60), (96, 100), (99, 100)])
def test_slice_equals_slice_of_the_whole(start: int, stop: int) -> None:
    part = samples_at(np.arange(start, stop), num_samples=100, seed=5, epoch=4)

    assert part.tolist() == whole(100, seed=5, epoch=4)[start:stop].tolist()


@pytest.mark.parametrize("world_size", range(1, 9))
def test_workers_share_one_order_at_any_world_size(world_size: int) -> None:
    parts = [
        samples_at(np.arange(rank, 60, world_size), num_samples=60, seed=1, epoch=1)
        for rank in range(world_size)
    ]

    joined = np.empty(60, dtype=np.int64)
    for rank, part in enumerate(parts):
        joined[rank::world_size] = part

    assert np.array_equal(joined, whole(60, seed=1))


@pytest.mark.parametrize("positions", [3, [3], [[1, 2], [3, 4]], np.empty(0, dtype=np.int64)])
def test_samples_have_the_shape_of_positions(positions: npt.ArrayLike) -> None:
    samples = samples_at(positions, num_samples=9, seed=0, epoch=1)

    assert samples.shape == np.shape(positions)
    assert samples.dtype == np.int64


def test_positions_are_left_unchanged() -> None:
    positions = np.arange(9, dtype=np.uint64)

    samples_at(positions, num_samples=9, seed=0, epoch=1)

    assert positions.tolist() == list(range(9))


@pytest.mark.parametrize("position", [1_000_000, HUGE - 1])
def test_huge_data_set_costs_no_memory(position: int) -> None:
    tracemalloc.start()

    sample = int(samples_at(position, num_samples=HUGE, seed=0, epoch=9))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 0 <= sample < HUGE
    assert peak_bytes < 1_000_000


def test_huge_order_repeats_no_sample() -> None:
    positions = np.linspace(0, HUGE - 1, 20_000).astype(np.int64)

    samples = samples_at(positions, num_samples=HUGE, seed=0, epoch=1)

    assert len(np.unique(samples)) == len(np.unique(positions))


@pytest.mark.parametrize("position", [10, 11, 10**15, -1])
def test_position_outside_of_the_data_raises(position: int) -> None:
    with pytest.raises(IndexError, match="outside of 10 samples"):
        samples_at([0, position], num_samples=10, seed=0, epoch=1)


@pytest.mark.parametrize("num_samples", [1000, 4096, 5000])
def test_order_is_unrelated_to_position(num_samples: int) -> None:
    order = whole(num_samples)

    bound = 5 / num_samples**0.5
    assert abs(np.corrcoef(np.arange(num_samples), order)[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    assert (np.abs(np.diff(order)) == 1).sum() < 15


def test_every_sample_comes_to_every_position() -> None:
    seen = np.zeros((8, 8))

    for epoch in range(1, 401):
        seen[np.arange(8), whole(8, epoch=epoch)] += 1

    assert np.all(np.abs(seen - 50) < 5 * 50**0.5)  # 50 expected, five deviations allowed
