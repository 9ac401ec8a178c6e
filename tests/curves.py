"""Event files as TensorBoard's own reader sees them."""

from pathlib import Path
from typing import Any

import numpy as np


def points_of(directory: Path | str) -> dict[str, list[Any]]:
    """All scalars of a run of TensorBoard by tag, in the order of reading; none is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def assert_each_batch_is_one_point(
    points: dict[str, list[Any]], told: list[dict[str, Any]]
) -> None:
    """Compare curves with the events of a run that was killed; each event has its point."""
    losses = {each["batch_count"]: each["loss"] for each in told}
    rates = {each["batch_count"]: each["lr"] for each in told}
    for tag, values in (("train/loss", losses), ("train/lr", rates)):
        found = points[tag]
        assert [each.step for each in found] == list(range(1, max(losses) + 1))
        assert [each.wall_time for each in found] == sorted(each.wall_time for each in found)
        seen = {each.step: each.value for each in found if each.step in values}
        assert seen == {step: np.float32(value) for step, value in values.items()}
