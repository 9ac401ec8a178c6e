"""A disk that is full: training goes on, says so, and the last good checkpoint stands."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elastic.harness import Undisturbed, resize, small_file_system, training
from tests.elastic.test_kill import assert_same_bits
from trm_dist.cli import main


def test_deadline_ends_torchrun_and_is_not_retried(small_disk: Path) -> None:
    flags = {"--checkpoint-interval": "2", "--store-deadline": "1"}
    with training(small_disk / "c", workers=2, max_restarts=20, flags=flags) as run:
        assert run.end() != 0
    assert run.messages().count("no checkpoint could be written") == 1
    assert len(run.events("started")) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 300 kB, as one checkpoint of the small training has about 100 kB."""
    with small_file_system(tmp_path / "disk", "300k") as mount:
        yield mount


def test_full_disk_is_told_and_training_ends_once_there_is_space(
    small_disk: Path, undisturbed: Undisturbed
) -> None:
    directory = small_disk / "checkpoints"
    with training(directory, flags={"--checkpoint-interval": "2"}) as run:
        run.wait_for(lambda: run.events("commitfailed"), "a failed commit")
        good_before = main(["verify", str(directory)])
        resize(small_disk, "100m")
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert good_before == 0
    assert main(["verify", str(directory)]) == 0
    assert "No space left" in run.events("commitfailed")[0]["error"]


def test_full_disk_stops_training_at_the_deadline_and_loses_nothing(
    small_disk: Path, undisturbed: Undisturbed
) -> None:
    directory = small_disk / "checkpoints"
    flags = {"--checkpoint-interval": "2", "--store-deadline": "1"}
    with training(directory, flags=flags) as first:
        assert first.end() == 1
    assert "no checkpoint could be written" in first.messages()
    assert main(["verify", str(directory)]) == 0
    resize(small_disk, "100m")
    with training(directory, flags=flags) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)
