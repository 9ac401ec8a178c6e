"""Curves for TensorBoard through kills: each batch and each evaluation is one point."""

from pathlib import Path

from tests.curves import assert_each_batch_is_one_point, points_of
from tests.elastic.harness import forget_snapshots, kill_everything, training

CURVES = {
    "--epochs": "4",
    "--tensorboard": "",
    "--eval-interval": "10",
    "--eval-dataset": "sudoku4:test?count=200",
}


def test_curves_go_on_through_kills_without_a_gap_or_a_point_twice(directory: Path) -> None:
    with training(directory, launch=2, flags=CURVES) as first:
        first.wait_for_batches(10)
        # In the middle of an evaluation; the newest points are in memory, and in no file yet.
        kill_everything(first)
    with training(directory, flags=CURVES) as second:
        second.wait_for_batches(16)
        kill_everything(second)
    forget_snapshots()  # as if the node was lost: batches are trained again
    with training(directory, flags=CURVES) as third:
        assert third.end() == 0, third.messages()
        told = [each for run in (first, second, third) for each in run.events("batch")]
    (branch,) = (directory / ".trm_dist" / "tensorboard").iterdir()
    assert_each_batch_is_one_point(points_of(branch / "train"), told)
    accuracy = points_of(branch / "evaluation")["evaluation/token_accuracy"]
    assert [each.step for each in accuracy] == [10, 20, 30, 40]
