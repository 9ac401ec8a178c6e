"""A batch that is trained again must give its bits again; if it does not, somebody is told."""

import os
import struct
from pathlib import Path

import pytest

from tests.elastic.harness import SNAPSHOTS, Training, Undisturbed, kill_everything, training
from tests.elastic.test_kill import assert_same_bits
from tests.elastic.test_memory import NO_COMMITS, told_twice
from trm_dist.checkpoint.memory import Slots

FLAGS = NO_COMMITS | {"--snapshot-every": "10"}


def killed_after(directory: Path, batches: int) -> Training:
    """Train, then kill everything; the last batches are to be trained again."""
    with training(directory, workers=2, flags=FLAGS) as run:
        run.wait_for_batches(batches)
        kill_everything(run)
    return run


def spoil_the_loss_of(batch_count: int) -> None:
    """Change the last bit of what a batch is remembered to have given, as a bad processor does."""
    (name,) = os.listdir(SNAPSHOTS)
    descriptor = os.open(f"{SNAPSHOTS}/{name}", os.O_RDWR)
    log = Slots(descriptor).loss_log
    assert struct.unpack_from("<Q", log, batch_count * 32) == (batch_count,)
    log[batch_count * 32 + 24] ^= 1
    os.close(descriptor)


def test_replayed_batches_are_found_to_be_the_same(
    directory: Path, undisturbed: Undisturbed
) -> None:
    first = killed_after(directory, 17)
    with training(directory, workers=3, flags=FLAGS) as second:
        assert second.end() == 0, second.messages()
        assert told_twice(first, second) != []
        assert second.events("diverged") == []
        assert_same_bits([first, second], undisturbed)


def test_replayed_batch_that_differs_is_told_of_once(directory: Path) -> None:
    first = killed_after(directory, 17)
    replayed = first.events("batch")[-1]["batch_count"] // 10 * 10 + 2
    for each in (replayed, replayed + 1):
        spoil_the_loss_of(each)

    with training(directory, workers=1, flags=FLAGS | {"--log-format": "text"}) as second:
        assert second.end() == 0, second.messages()

    assert second.messages().count("is trained again and gives the loss 0x1.") == 1
    assert f"batch {replayed} is trained again" in second.messages()
    assert "a processor or its memory has failed" in second.messages()


def test_other_kind_of_processor_is_named_as_the_cause(directory: Path) -> None:
    first = killed_after(directory, 17)
    replayed = first.events("batch")[-1]["batch_count"] // 10 * 10 + 2
    spoil_the_loss_of(replayed)  # the kernels of this small model may well agree by themselves

    with training(directory, flags=FLAGS | {"--cpu-capability": "default"}) as second:
        assert second.end() == 0, second.messages()

    (told,) = second.events("diverged")
    assert told["is_other_environment"] is True
    assert told["batch_count"] <= replayed
    assert told["loss"] != told["loss_before"]


@pytest.mark.soak
def test_node_without_the_log_says_nothing(directory: Path, undisturbed: Undisturbed) -> None:
    flags = {"--snapshot-slots": "0", "--checkpoint-interval": "5"}
    with training(directory, workers=2, flags=flags) as run:
        run.wait_for_batches(13)
        kill_everything(run)
    with training(directory, flags=flags) as second:
        assert second.end() == 0, second.messages()
        assert second.events("diverged") == []
        assert_same_bits([run, second], undisturbed)
