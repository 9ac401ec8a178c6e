"""Curves and timelines as plain values for a page: paths, ticks, shares. Pure.

Everything is in units of the drawing, whatever its size on the screen: 0 to WIDTH from the left, 0
to HEIGHT from the top.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trm_dist.observe.goodput import Segment
from trm_dist.observe.ledger import Spent

WIDTH, HEIGHT = 1000.0, 100.0

_NICE = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    share: float
    """Of the axis, 0 to 1, from the left or from the bottom."""
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    path: str
    """As SVG writes it."""
    newest: str
    """Its last value."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a common axis."""

    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


@dataclass(frozen=True, slots=True)
class Column:
    """A part of a timeline: what its time was spent on, as shares that add up to 1."""

    shares: Mapping[Spent, float]
    label: str


def chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_end: float,
    y_range: tuple[float, float],
) -> Chart:
    """Draw series of (x, y) over 0 to `x_end`."""
    low, high = y_range
    return Chart(
        curves=[
            Curve(name, _path(points, x_end, low, high), number(points[-1][1]))
            for name, points in series.items()
            if points
        ],
        x_ticks=[Tick(each / x_end, _label(each)) for each in ticks(0, x_end, 6)],
        y_ticks=[Tick((each - low) / (high - low), _label(each)) for each in ticks(low, high, 5)],
    )


def y_range_of(values: Iterable[float]) -> tuple[float, float]:
    """Return a range from 0 that holds finite values with a little room above."""
    highest = max((each for each in values if math.isfinite(each)), default=1.0)
    return 0.0, 1.05 * highest or 1.0


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers within a range, at most so many."""
    if high <= low:
        return [low]
    least_step = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(least_step))
    step = next(each * unit for each in _NICE if each * unit >= least_step * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Write a number for people, with three digits that count."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 9)}f}"


def _label(value: float) -> str:
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def columns(segments: Sequence[Segment], most: int) -> list[Column]:
    """Cut a timeline into columns of equal time."""
    if not segments:
        return []
    begin, end = segments[0].since, segments[-1].until
    width = (end - begin) / most
    sums: list[dict[Spent, float]] = [{} for _ in range(most)]
    for each in segments:
        first = int((each.since - begin) / width)
        last = min(most - 1, int((each.until - begin) / width))
        for index in range(min(first, last), last + 1):
            left = begin + index * width
            overlap = min(each.until, left + width) - max(each.since, left)
            if overlap > 0:
                sums[index][each.spent] = sums[index].get(each.spent, 0.0) + overlap
    return [_column(index * width, width, shares) for index, shares in enumerate(sums)]


def _column(begin: float, width: float, seconds: Mapping[Spent, float]) -> Column:
    total = math.fsum(seconds.values()) or 1.0
    shares = {each: seconds[each] / total for each in Spent if each in seconds}
    told = ", ".join(
        f"{each.replace('_', ' ')} {share:.0%}"
        for each, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= 0.005
    )
    return Column(shares, f"{duration(begin)} to {duration(begin + width)}: {told}")


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _path(points: Sequence[tuple[float, float]], x_end: float, low: float, high: float) -> str:
    """Draw a line through points; one that is not finite interrupts it."""
    pieces = []
    command = "M"
    for x, y in points:
        if not math.isfinite(y):
            command = "M"
            continue
        left = WIDTH * x / x_end
        top = HEIGHT * (high - min(max(y, low), high)) / (high - low)
        pieces.append(f"{command}{left:.2f} {top:.2f}")
        command = "L"
    return "".join(pieces)
