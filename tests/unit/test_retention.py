"""Which checkpoints may go, decided on numbers alone."""

import random

import pytest

from trm_dist.checkpoint.names import epoch_name
from trm_dist.checkpoint.retention import Kept, to_delete


def kept(*batch_counts: int) -> list[Kept]:
    return [Kept(epoch_name(1, count), count) for count in batch_counts]


def deleted(files: list[Kept], keep_last: int, keep_every: int) -> list[int]:
    counts = {each.name: each.batch_count for each in files}
    return [counts[name] for name in to_delete(files, keep_last=keep_last, keep_every=keep_every)]


@pytest.mark.parametrize(
    ("batch_counts", "keep_last", "keep_every", "gone"),
    [
        ([], 1, 0, []),
        ([10], 1, 0, []),
        ([10, 20, 30], 0, 0, []),
        ([10, 20, 30], 0, 20, []),
        ([10, 20, 30], 1, 0, [10, 20]),
        ([10, 20, 30], 2, 0, [10]),
        ([10, 20, 30], 3, 0, []),
        ([10, 20, 30], 99, 0, []),
        ([30, 10, 20], 1, 0, [10, 20]),
        ([9, 10, 100], 1, 0, [9, 10]),
        ([10, 20, 30, 40, 50], 1, 20, [10, 30]),
        ([10, 20, 30, 40, 50], 2, 20, [10, 30]),
        ([10, 20, 30, 40, 50], 1, 7, [10, 20, 30, 40]),
        ([10, 20, 30, 40, 50], 1, 10, []),
        ([10, 20, 30, 40, 50], 1, 1, []),
    ],
)
def test_retention_deletes_what_is_not_kept(
    batch_counts: list[int], keep_last: int, keep_every: int, gone: list[int]
) -> None:
    assert deleted(kept(*batch_counts), keep_last, keep_every) == gone


@pytest.mark.parametrize("keep_last", range(5))
@pytest.mark.parametrize("keep_every", [0, 3, 1000])
def test_retention_never_deletes_the_newest(keep_last: int, keep_every: int) -> None:
    files = kept(*random.Random(keep_last).sample(range(1, 100), 8))

    gone = deleted(files, keep_last, keep_every)

    assert max(each.batch_count for each in files) not in gone


@pytest.mark.parametrize("keep_last", [1, 2, 3])
@pytest.mark.parametrize("keep_every", [0, 4])
def test_retention_finds_nothing_more_when_repeated(keep_last: int, keep_every: int) -> None:
    files = kept(*range(1, 20))

    gone = to_delete(files, keep_last=keep_last, keep_every=keep_every)
    left = [each for each in files if each.name not in gone]

    assert to_delete(left, keep_last=keep_last, keep_every=keep_every) == []


def test_retention_leaves_its_argument_unchanged() -> None:
    files = kept(30, 10, 20)

    to_delete(files, keep_last=1, keep_every=0)

    assert files == kept(30, 10, 20)
