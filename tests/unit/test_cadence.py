"""How often a snapshot is due, and what "auto" makes of what it measures."""

import pytest

from trm_dist.checkpoint.cadence import Cadence


def due(cadence: Cadence, last: int = 12) -> list[int]:
    return [count for count in range(1, last + 1) if cadence.is_due(count)]


@pytest.mark.parametrize(("every", "counts"), [(1, [*range(1, 13)]), (5, [5, 10]), (13, [])])
def test_every_so_many_batches(every: int, counts: list[int]) -> None:
    cadence = Cadence(every)
    for _ in range(20):
        cadence.measure(copy_s=1.0, batch_s=0.1)

    assert due(cadence) == counts


def test_auto_begins_with_every_batch() -> None:
    cadence = Cadence("auto")
    for _ in range(7):
        cadence.measure(copy_s=1.0, batch_s=0.1)

    assert cadence.every == 1


@pytest.mark.parametrize(
    ("copy_s", "batch_s", "every"),
    [(0.001, 1.0, 1), (0.01, 1.0, 1), (0.011, 1.0, 2), (0.05, 1.0, 5), (1.0, 0.1, 1000)],
)
def test_auto_keeps_the_cost_below_a_hundredth(copy_s: float, batch_s: float, every: int) -> None:
    cadence = Cadence("auto")
    for _ in range(8):
        cadence.measure(copy_s=copy_s, batch_s=batch_s)

    assert cadence.every == every
    assert copy_s / (every * batch_s) <= 0.01


def test_auto_takes_the_median_and_settles(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cadence = Cadence("auto")
    for copy_s in (9.0, *[0.03] * 7, *[9.0] * 8):  # the first copy meets cold pages
        cadence.measure(copy_s=copy_s, batch_s=1.0)

    assert cadence.every == 3
    assert caplog.text.count("costs up to 2 finished batch(es)") == 1
