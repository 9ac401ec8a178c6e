"""The counters: one batch at a time, one epoch after the other."""

from dataclasses import FrozenInstanceError

import pytest

from trm_dist.progress import COUNTERS, Progress

DONE = Progress(epoch=1, batch_idx=10, batch_count=10, global_step=37, samples_seen=96)


def test_advance_counts_one_batch() -> None:
    start = Progress(epoch=3, batch_idx=2, batch_count=22, global_step=50, samples_seen=200)

    after = start.advance(samples=6, optimizer_steps=4)

    assert after == Progress(epoch=3, batch_idx=3, batch_count=23, global_step=54, samples_seen=206)


def test_advance_leaves_the_boundary_before_it() -> None:
    start = Progress()

    start.advance(samples=4, optimizer_steps=1)

    assert start == Progress(epoch=1, batch_idx=0, batch_count=0, global_step=0, samples_seen=0)


def test_progress_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        DONE.epoch = 2  # type: ignore[misc]


@pytest.mark.parametrize("batch_idx", [0, 1, 9])
def test_next_batch_stays_in_unfinished_epoch(batch_idx: int) -> None:
    at = Progress(epoch=2, batch_idx=batch_idx, batch_count=10 + batch_idx)

    assert at.at_next_batch(10) == at


def test_next_batch_opens_epoch_after_complete_one() -> None:
    assert DONE.at_next_batch(10) == Progress(
        epoch=2, batch_idx=0, batch_count=10, global_step=37, samples_seen=96
    )


def test_next_batch_opens_epoch_when_data_shrank() -> None:
    assert DONE.at_next_batch(7).epoch == 2


def test_boundaries_keep_complete_epoch_and_skip_batch_zero() -> None:
    at, stored = Progress(), []

    for _ in range(6):
        at = at.at_next_batch(3).advance(samples=4, optimizer_steps=2)
        stored.append((at.epoch, at.batch_idx))

    assert stored == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("epoch", "batch_idx", "finished"),
    [(1, 0, False), (1, 10, False), (3, 9, False), (3, 10, True), (4, 0, True), (4, 1, True)],
)
def test_run_is_finished_after_last_batch(epoch: int, batch_idx: int, finished: bool) -> None:
    at = Progress(epoch=epoch, batch_idx=batch_idx)

    assert at.is_finished(epochs=3, batches_per_epoch=10) is finished


def test_raised_total_reopens_a_finished_run() -> None:
    assert DONE.is_finished(epochs=1, batches_per_epoch=10)
    assert not DONE.is_finished(epochs=2, batches_per_epoch=10)


def test_dict_of_counters_makes_the_same_progress() -> None:
    assert Progress(**DONE.as_dict()) == DONE


def test_counters_are_the_five_documented_ones() -> None:
    assert COUNTERS == ("epoch", "batch_idx", "batch_count", "global_step", "samples_seen")
    assert tuple(DONE.as_dict()) == COUNTERS
