"""Curves for TensorBoard through kills: each batch and each evaluation is one point."""

from pathlib import Path

from tests.curves import assert_each_batch_is_one_point, points_of
from tests.elastic.harness import forget_snapshots, kill_everything, training

EPOCHS = {"--epochs": "4"}
CURVES = EPOCHS | {"--tensorboard": "", "--eval-interval": "20"}


def test_curves_go_on_through_kills_without_a_gap_or_a_point_twice(directory: Path) -> None:
    with training(directory, launch=2, flags=CURVES) as first:
        first.wait_for_batches(11)
        kill_everything(first)  # the newest points are in memory, and in no file yet
    # A flag that is not given takes the stored value.
    with training(directory, flags=EPOCHS) as second:
        second.wait_for_batches(16)
        kill_everything(second)
    forget_snapshots()  # as if the node was lost: batches are trained again
    with training(directory, flags=EPOCHS) as third:
        assert third.end() == 0, third.messages()
        told = [each for run in (first, second, third) for each in run.events("batch")]
    (branch,) = (directory / ".trm_dist" / "tensorboard").iterdir()
    assert_each_batch_is_one_point(points_of(branch / "train"), told)
    accuracy = points_of(branch / "evaluation")["evaluation/token_accuracy"]
    assert [each.step for each in accuracy] == [20, 40]
