"""Rows of a benchmark: ours beside each peer and a physical limit, as text, JSON and a picture.

A measurement returns rows; its own `python -m` and `make bench` print, keep and draw them from
here. All ways of a row are measured in turns, so values of the same round stand side by side and a
ratio is one of pairs.
"""

import argparse
import json
import math
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import jinja2

from trm_dist.observe.charts import number

SIZES = ("full", "quick", "tiny")
"""How much is measured. `tiny` is a smoke test: it shows that everything runs, not how fast."""

TEMPLATES = Path(__file__).parents[1] / "templates"

BEST = "the best peer"
"""What a goal is held against when it names no other."""

HEADER = ("what", "unit, better", "ours", "beside", "theirs", "ours to theirs", "goal")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of finite or infinite values, at least one."""
        if len(values) == 1 or not all(map(math.isfinite, values)):
            # Quartiles between a number and infinity are none: the ends stand for them.
            return cls(min(values), statistics.median_low(values), max(values))
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        median = number(self.median)
        if self.low == self.median == self.high:
            return median
        return f"{median} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted: a bound of ours to something else, in the direction that is better."""

    bound: float
    beside: str | None = BEST
    """The peer or the limit that it is a ratio to; None: the value itself is bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was measured: a value for each round, ours and everybody's.

    Raises:
        ValueError: Rounds are missing, or the goal names what was not measured.
    """

    subject: str
    what: str
    unit: str
    better: Literal["more", "less"]
    ours: list[float]
    peers: dict[str, list[float]] = field(default_factory=dict)
    limit: dict[str, list[float]] = field(default_factory=dict)
    """What the machine itself allows; one at most."""
    goal: Goal | None = None

    def __post_init__(self) -> None:
        rounds = {len(each) for each in (self.ours, *self.others.values())}
        if len(rounds) != 1 or not self.ours:
            raise ValueError(f"{self.title}: ways with {rounds} rounds cannot be compared")
        if self.goal and self.goal.beside not in {None, BEST, *self.others}:
            raise ValueError(f"{self.title}: its goal is held against nothing that was measured")

    @property
    def title(self) -> str:
        """What it is, in full."""
        return f"{self.subject}: {self.what}"

    @property
    def others(self) -> dict[str, list[float]]:
        """The peers and the limit."""
        return self.peers | self.limit

    @property
    def best(self) -> str | None:
        """The peer that is best; None without peers."""
        by_median = {name: statistics.median(each) for name, each in self.peers.items()}
        pick = max if self.better == "more" else min
        return pick(by_median, key=lambda name: by_median[name]) if by_median else None

    def ratio(self, name: str) -> Spread:
        """Return ours to that of a peer or the limit, round by round."""
        pairs = zip(self.ours, self.others[name], strict=True)
        return Spread.of([_divided(mine, other) for mine, other in pairs])

    def advantage(self, name: str) -> Spread:
        """Return how many times better ours is, whichever direction is the better one."""
        if self.better == "more":
            return self.ratio(name)
        pairs = zip(self.ours, self.others[name], strict=True)
        return Spread.of([_divided(other, mine) for mine, other in pairs])

    @property
    def is_behind(self) -> bool:
        """Whether the best peer is ahead of us."""
        return self.best is not None and self.advantage(self.best).median < 1

    @property
    def goal_beside(self) -> str | None:
        """The name that the goal is held against; None: it is absolute, or there is none."""
        if self.goal is None:
            return None
        return self.best if self.goal.beside == BEST else self.goal.beside

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without one, or without a peer to hold it against."""
        if self.goal is None or (self.goal.beside == BEST and self.best is None):
            return None
        beside = self.goal_beside
        value = Spread.of(self.ours) if beside is None else self.ratio(beside)
        if self.better == "more":
            return value.median >= self.goal.bound
        return value.median <= self.goal.bound


def _divided(a: float, b: float) -> float:
    """Divide counts that may be 0: nothing beside nothing is the same."""
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b


# -- text ------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return all rows as one table in Markdown, aligned for a terminal too."""
    lines = [line for row in rows for line in _lines_of(row)]
    widths = [max(len(each) for each in column) for column in zip(HEADER, *lines, strict=True)]
    ruler = tuple("-" * width for width in widths)
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in (HEADER, ruler, *lines)
    )


def _lines_of(row: Row) -> Iterator[tuple[str, ...]]:
    """Yield a line for each of the others; the first says what it is and what ours is."""
    own = (row.title, f"{row.unit}, {row.better}", str(Spread.of(row.ours)))
    goal, beside = _goal(row) if row.goal else "", row.goal_beside or next(iter(row.others), "")
    if not row.others:
        yield (*own, "", "", "", goal)
    for name, values in row.others.items():
        label = f"limit: {name}" if name in row.limit else name
        wanted = goal if name == beside else ""
        yield (*own, label, str(Spread.of(values)), str(row.ratio(name)), wanted)
        own = ("", "", "")


def _goal(row: Row) -> str:
    assert row.goal
    sign = ">=" if row.better == "more" else "<="
    return f"{sign} {number(row.goal.bound)} {'met' if row.is_met else 'MISSED'}"


def verdict(rows: Iterable[Row]) -> str:
    """Say where a peer is ahead, and which goals are missed."""
    behind, missed = [], []
    for row in rows:
        if row.is_behind:
            assert row.best
            lead = row.advantage(row.best)
            doubt = "; within the spread" if lead.high >= 1 else ""
            times = f"{number(1 / lead.median)}x" if lead.median else "infinitely"
            behind.append(f"- {row.title}: {row.best}, {times} as good as ours{doubt}")
        if row.is_met is False:
            missed.append(f"- {row.title}: {_goal(row)}, beside {row.goal_beside or 'no other'}")
    return "\n".join([
        "A peer is ahead:" if behind else "No peer is ahead.", *behind,
        "Goals that are missed:" if missed else "No goal is missed.", *missed,
    ])  # fmt: skip


# -- files -----------------------------------------------------------------------------------------


def to_json(rows: Sequence[Row], setting: Mapping[str, Any] | None = None) -> str:
    """Return rows with all their values, and what they were measured on."""
    content = {"setting": dict(setting or {}), "rows": [asdict(row) for row in rows]}
    return json.dumps(content, indent=1) + "\n"


def from_json(text: str) -> list[Row]:
    """Return the rows of `to_json`."""
    return [
        Row(**(each | {"goal": Goal(**each["goal"]) if each["goal"] else None}))
        for each in json.loads(text)["rows"]
    ]


def parser(description: str, *, keeps_rows: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that every measurement has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--size", choices=SIZES, default="full", help="how much is measured; tiny: a smoke test"
    )
    if keeps_rows:
        found.add_argument("--rows", default="", metavar="FILE", help="keep the rows there, too")
    return found


def end_in_order() -> None:
    """Make a SIGTERM an exception, so that what was started is ended, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def publish(rows: Sequence[Row], path: str) -> None:
    """Print rows, and keep them in a file where one is named."""
    print(table(rows), flush=True)
    if path:
        Path(path).write_text(to_json(rows))


# -- picture ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """Ours beside one other, on the axis of the picture: shares of it, 0 to 1."""

    name: str
    is_limit: bool
    place: float
    low: float
    high: float
    label: str
    is_ahead: bool


@dataclass(frozen=True, slots=True)
class Axis:
    """Powers of ten, from one that is below all values to one that is above."""

    first: int
    last: int

    @classmethod
    def over(cls, values: Iterable[float]) -> Self:
        """Return the axis that holds all finite positive values, and 1."""
        logs = [math.log10(each) for each in values if 0 < each < math.inf] or [0.0]
        return cls(min(-1, math.floor(min(logs))), max(1, math.ceil(max(logs))))

    def place(self, value: float) -> float:
        """Return where a value is; what is off the axis is at its end."""
        if value <= 0:
            return 0.0
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels of the powers of ten."""
        return [
            (self.place(10.0**power), f"{number(10.0**power).rstrip('0').rstrip('.')}x" if power < 0
             else f"{10**power:,}x")
            for power in range(self.first, self.last + 1)
        ]  # fmt: skip


def draw(rows: Sequence[Row], title: str) -> str:
    """Draw how many times better ours is than each other, as one SVG."""
    spreads = [row.advantage(name) for row in rows for name in row.others]
    axis = Axis.over(value for each in spreads for value in (each.low, each.high))
    marks = [(row, [_mark(row, name, axis) for name in row.others]) for row in rows if row.others]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("benchmark.svg").render(rows=marks, axis=axis, title=title)


def _mark(row: Row, name: str, axis: Axis) -> Mark:
    found = row.advantage(name)
    label = number(found.median) + "x"
    if not math.isfinite(found.median):
        label = f"0 against {number(statistics.median(row.others[name]))}"
    places = (axis.place(each) for each in (found.median, found.low, found.high))
    return Mark(name, name in row.limit, *places, label=label, is_ahead=found.median >= 1)
