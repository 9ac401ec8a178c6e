"""Names of checkpoints are built, read and ordered by number."""

import pytest

from trm_dist.checkpoint.names import (
    FINAL,
    LATEST,
    epoch_name,
    is_checkpoint_name,
    parse_epoch_name,
)

FOREIGN = [
    "",
    "checkpoint_epoch_1_batch_0.pt",
    "checkpoint_epoch_0_batch_1.pt",
    "checkpoint_epoch_01_batch_1.pt",
    "checkpoint_epoch_1_batch_-1.pt",
    "checkpoint_epoch_1_batch_1.pt\n",
    "checkpoint_epoch_1_batch_1.pt.tmp",
    "checkpoint_epoch_1_batch_1_pt",
    "checkpoint_epoch_1_batch_\u0661.pt",
    "checkpoint_epoch__batch_1.pt",
    "old_checkpoint_epoch_1_batch_1.pt",
    "Checkpoint_Latest.pt",
    "checkpoint_latest.pt.bak",
    "model.pt",
    ".trm_dist",
]


@pytest.mark.parametrize(
    ("epoch", "batch_idx", "name"),
    [
        (1, 1, "checkpoint_epoch_1_batch_1.pt"),
        (1, 100, "checkpoint_epoch_1_batch_100.pt"),
        (12, 7, "checkpoint_epoch_12_batch_7.pt"),
    ],
)
def test_epoch_name_is_the_documented_one(epoch: int, batch_idx: int, name: str) -> None:
    assert epoch_name(epoch, batch_idx) == name


@pytest.mark.parametrize("counters", [(1, 1), (1, 10), (9, 99), (10, 100), (10**6, 10**9)])
def test_parse_epoch_name_reverses_epoch_name(counters: tuple[int, int]) -> None:
    assert parse_epoch_name(epoch_name(*counters)) == counters


@pytest.mark.parametrize("name", [*FOREIGN, LATEST, FINAL])
def test_parse_epoch_name_refuses_other_names(name: str) -> None:
    assert parse_epoch_name(name) is None


def test_epoch_names_sort_by_number() -> None:
    names = [epoch_name(*each) for each in [(10, 1), (2, 9), (1, 100), (2, 10), (1, 20)]]

    by_age = sorted(names, key=lambda name: parse_epoch_name(name) or (0, 0))

    assert by_age == [epoch_name(*each) for each in [(1, 20), (1, 100), (2, 9), (2, 10), (10, 1)]]


@pytest.mark.parametrize("name", [LATEST, FINAL, "checkpoint_epoch_3_batch_14.pt"])
def test_documented_names_are_checkpoint_names(name: str) -> None:
    assert is_checkpoint_name(name)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_names_are_no_checkpoint_names(name: str) -> None:
    assert not is_checkpoint_name(name)


def test_other_digits_than_ours_are_no_number() -> None:
    assert parse_epoch_name("checkpoint_epoch_1_batch_1\u0661.pt") is None
