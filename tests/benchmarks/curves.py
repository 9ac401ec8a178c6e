"""Draws how a run learned, from the events of --log-format json.

    python -m tests.benchmarks.curves EVENTS.jsonl PICTURE.svg TITLE

Accuracies over samples: lines are means over parts of the training, dots are evaluations.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 28, 40, 40
_NUM_PARTS = 60
_COLOURS = {"token_accuracy": "#1f6feb", "exact_accuracy": "#cf222e"}
_NAMES = {"token_accuracy": "token accuracy", "exact_accuracy": "exact accuracy"}

Point = tuple[float, float]


def main(events: Path, picture: Path, title: str) -> None:
    kinds: dict[str, dict[int, dict[str, Any]]] = {"batch": {}, "evaluated": {}}
    lines = events.read_text().splitlines()
    for event in (json.loads(line) for line in lines if line.startswith("{")):
        # The last telling counts: a batch may be trained again after a restart.
        kinds.get(event["event"], {})[event["batch_count"]] = event
    batches, evaluations = (
        [each[count] for count in sorted(each)] for each in (kinds["batch"], kinds["evaluated"])
    )
    picture.write_text(draw(title, batches, evaluations))
    print(summary(batches, evaluations))


def summary(batches: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """What a README can quote."""
    lines = [f"{len(batches)} batches, {batches[-1]['samples_seen']:,} samples"]
    lines += [
        f"after {each['samples_seen']:>9,} samples: held-out token {each['token_accuracy']:.4f} "
        f"exact {each['exact_accuracy']:.4f} mean steps {each['mean_steps']:.2f}"
        for each in evaluations
    ]
    return "\n".join(lines)


def draw(
    title: str, batches: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> str:
    last = float(batches[-1]["samples_seen"])

    def place(point: Point) -> Point:
        x, y = point
        return (
            _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [*axes(last, place), text(_LEFT, 18, title, "start", size=14)]
    for number, (name, colour) in enumerate(_COLOURS.items()):
        line = map(place, averaged(batches, name))
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{joined(line)}"/>'
        )
        for each in evaluations:
            x, y = place((each["samples_seen"], each[name]))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        x = _LEFT + 130.0 * number
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colour}"/>')
        parts.append(text(x + 14, 35, _NAMES[name], "start"))
    legend = "line: training, dots: held out, averaged weights"
    parts.append(text(_WIDTH - _RIGHT, 35, legend, "end"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>\n' + "\n".join(parts)
    ) + "\n</svg>\n"


def axes(last: float, place: Callable[[Point], Point]) -> Iterable[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (left, y), (right, _) = place((0, share)), place((last, share))
        yield f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#d0d7de"/>'
        yield text(left - 6, y + 4, f"{share:g}", "end")
    step = round_step(last)
    for number in range(int(last // step) + 1):
        x, bottom = place((number * step, 0))
        yield text(x, bottom + 16, f"{number * step:,}", "middle")
    x, bottom = place((last / 2, 0))
    yield text(x, bottom + 32, "samples", "middle")


def round_step(last: float) -> int:
    """The smallest of 1, 2, 5, 10, 20 ... that cuts the axis into at most six parts."""
    tens = 10 ** max(0, math.floor(math.log10(last / 6)))
    return next(tens * each for each in (1, 2, 5, 10) if tens * each * 6 >= last)


def averaged(batches: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """The mean of each of some parts of the training, at its middle."""
    count = min(_NUM_PARTS, len(batches))
    cuts = [len(batches) * part // count for part in range(count + 1)]
    return [
        (
            mean(each["samples_seen"] for each in batches[low:high]),
            mean(each[name] for each in batches[low:high]),
        )
        for low, high in pairwise(cuts)
    ]


def joined(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def text(x: float, y: float, words: str, anchor: str, size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#24292f">{escape(words)}</text>'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
