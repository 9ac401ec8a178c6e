"""Curves and timelines in units of a drawing."""

import math

import pytest

from trm_dist.observe.charts import chart, columns, duration, number, ticks, y_range_of
from trm_dist.observe.goodput import Segment
from trm_dist.observe.ledger import Spent


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 7, [0, 2, 4, 6]),
        (3, 1000, [200, 400, 600, 800, 1000]),
        (5, 5, [5]),
        (0, 1e-7, [0, 2e-8, 4e-8, 6e-8, 8e-8, 1e-7]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize("high", [1, 2, 3, 7, 9.99, 1234, 1e9])
@pytest.mark.parametrize("most", [2, 5, 6])
def test_there_are_never_too_many_ticks(high: float, most: int) -> None:
    assert 1 <= len(ticks(0, high, most)) <= most + 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12, "12"), (1234567, "1,234,567"), (0.12345, "0.123"), (1.5, "1.50"),
        (123.456, "123"), (0.000123456, "0.000123"), (math.inf, "inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (59.4, "59.4 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"),
        (3661, "1 h 01 min"), (90000, "1 d 01 h"),
    ],
)  # fmt: skip
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_curve_goes_through_its_points_and_is_interrupted_where_it_is_not_finite() -> None:
    points = [(0.0, 0.0), (5.0, 1.0), (6.0, math.nan), (10.0, 0.5)]

    found = chart({"loss": points, "none": []}, x_end=10.0, y_range=(0.0, 1.0))

    assert [each.name for each in found.curves] == ["loss"]
    assert found.curves[0].path == "M0.00 100.00L500.00 0.00M1000.00 50.00"


def test_range_of_nothing_or_of_zeros_is_a_range() -> None:
    assert y_range_of([]) == (0.0, 1.05)
    assert y_range_of([0.0]) == (0.0, 1.0)
    assert y_range_of([math.inf, 2.0]) == (0.0, 2.1)


def test_columns_share_out_every_second() -> None:
    segments = [
        Segment(100.0, 105.0, Spent.STARTUP, 0),
        Segment(105.0, 117.5, Spent.PRODUCTIVE, 0),
        Segment(117.5, 120.0, Spent.DOWN, 1),
    ]

    found = columns(segments, 2)

    assert [dict(each.shares) for each in found] == [
        {Spent.STARTUP: 0.5, Spent.PRODUCTIVE: 0.5},
        {Spent.PRODUCTIVE: 0.75, Spent.DOWN: 0.25},
    ]
    assert found[1].label == "10.0 s to 20.0 s: productive 75%, down 25%"


def test_columns_of_many_short_pieces_add_up() -> None:
    segments = [
        Segment(each / 7, (each + 1) / 7, list(Spent)[each % 9], each) for each in range(1000)
    ]

    found = columns(segments, 120)

    assert len(found) == 120
    assert all(math.fsum(each.shares.values()) == pytest.approx(1) for each in found)


def test_no_time_has_no_columns() -> None:
    assert columns([], 10) == []
