"""Where the time of a run went, over all its starts: the ledgers read and added up. Pure.

The time from the first start to the last sign of life is cut into pieces without gap or overlap, so
the sums are the wall time.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trm_dist.observe.ledger import FINISHED, Spent


@dataclass(frozen=True, slots=True)
class Span:
    """Some seconds of a start."""

    since: float
    until: float
    first: int
    """Batches of the run that were complete at its beginning."""
    last: int
    """Batches that were complete at its end."""
    seconds: Mapping[str, float]
    unfinished: float = 0.0
    """Seconds of a batch that was not complete at its end."""
    loss: float | None = None
    token_accuracy: float | None = None
    exact_accuracy: float | None = None
    evaluation: Mapping[str, float] | None = None
    commits: int = 0
    commit_bytes: int = 0
    committed: int = 0
    """Batches in the newest checkpoint of it."""
    commit_failures: int = 0
    skipped: int = 0
    diverged: int = 0


_NEEDED = {"since", "until", "first", "last", "seconds"}


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the writer."""

    started_at: float
    """Seconds since the epoch."""
    launched_at: float
    host: str
    cause: str
    """Why the start before it has ended, as whoever has started it says."""
    spans: Sequence[Span]
    training: Mapping[str, Any] = field(default_factory=dict)
    """What it went on from; empty when it has not come to train."""
    reason: str = ""
    """How it has ended, by its own words; empty: it was killed, or goes on."""
    digest: str = ""

    @property
    def last_at(self) -> float:
        """Its last sign of life."""
        return max((each.until for each in self.spans), default=self.started_at)

    @property
    def resumed_at(self) -> int | None:
        """Batches that were complete when it has begun to train."""
        return int(self.training["batch_count"]) if self.training else None


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the run's time."""

    since: float
    until: float
    spent: Spent
    start: int
    """Number of the start it belongs to, from 0; that of the next one while nobody was there."""


@dataclass(frozen=True, slots=True)
class Account:
    """Where the time went."""

    segments: Sequence[Segment]
    seconds: Mapping[str, float]
    """By what they were spent on; every kind is there."""
    total_s: float

    @property
    def goodput(self) -> float:
        """The productive share of the time, 0 to 1."""
        return self.seconds[Spent.PRODUCTIVE] / self.total_s if self.total_s else 0.0


def parse(data: bytes) -> Start | None:
    """Read the ledger of one start; a line that was being written is left out.

    Returns:
        None if it is none.
    """
    records = list(_records(data))
    if not records or records[0].get("is") != "start":
        return None
    found: dict[str, list[dict[str, Any]]] = {"span": [], "training": []}
    for each in records[1:]:
        found.get(each.pop("is", ""), []).append(each)
    last = found["span"][-1] if found["span"] else {}
    known = set(Span.__dataclass_fields__)
    return Start(
        started_at=records[0]["started_at"],
        launched_at=records[0]["launched_at"],
        host=records[0]["host"],
        cause=records[0]["cause"],
        spans=[
            Span(**{name: value for name, value in each.items() if name in known})
            for each in found["span"]
            if each.keys() >= _NEEDED
        ],
        training=found["training"][-1] if found["training"] else {},
        reason=last.get("reason", ""),
        digest=last.get("digest", ""),
    )


def _records(data: bytes) -> Iterable[dict[str, Any]]:
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def account(starts: Sequence[Start]) -> Account:
    """Add up where the time went; what passes after the run has finished does not count.

    Args:
        starts: Of one run, oldest first.
    """
    segments: list[Segment] = []
    floors = _floors(starts)
    skipped_s = 0.0
    begins = [_begin(start, before) for start, before in zip(starts, [None, *starts], strict=False)]
    for number, start in enumerate(starts):
        if number and starts[number - 1].reason == FINISHED:  # nothing was to be done meanwhile
            skipped_s += max(0.0, begins[number] - starts[number - 1].last_at)
        at = begins[number] - skipped_s
        if segments and at > segments[-1].until:
            segments.append(Segment(segments[-1].until, at, Spent.DOWN, number))
        # Two writers at once: the older one's time is over when the newer one begins.
        end = min([*begins[number + 1 :], start.last_at]) - skipped_s
        before = (Spent.STARTUP, start.started_at - begins[number])
        pieces = [before, *_pieces(start, floors[number])]
        segments += _cut(pieces, at, end, number)
    seconds = dict.fromkeys(map(str, Spent), 0.0)
    for each in segments:
        seconds[each.spent] += each.until - each.since
    total_s = segments[-1].until - segments[0].since if segments else 0.0
    return Account(segments, seconds, total_s)


def _begin(start: Start, before: Start | None) -> float:
    """Return when a start begins: with its launcher, if that has started nothing before it."""
    if before is None or start.launched_at >= before.last_at:
        return min(start.launched_at, start.started_at)
    return start.started_at


def _floors(starts: Sequence[Start]) -> list[int | None]:
    """Return for each start up to which batch later ones have kept its work; None: all of it."""
    floors: list[int | None] = []
    floor: int | None = None
    for start in reversed(starts):
        floors.insert(0, floor)
        if start.resumed_at is not None:
            floor = start.resumed_at if floor is None else min(floor, start.resumed_at)
    return floors


def _pieces(start: Start, floor: int | None) -> Iterable[tuple[Spent, float]]:
    """Yield what a start spent time on, in about this order, its lost work told apart."""
    is_over = bool(start.reason) or floor is not None
    for number, span in enumerate(start.spans):
        productive = span.seconds.get(Spent.PRODUCTIVE, 0.0)
        kept = productive * _kept_share(span, floor)
        is_last = number == len(start.spans) - 1
        # What a line leaves unfinished, the next one takes up, except after the last one.
        unfinished = span.unfinished if is_last else 0.0
        for spent in Spent:
            if spent not in {Spent.PRODUCTIVE, Spent.LOST_WORK}:
                yield spent, span.seconds.get(spent, 0.0)
        yield Spent.PRODUCTIVE, kept + (0.0 if is_over else unfinished)
        yield Spent.LOST_WORK, productive - kept + (unfinished if is_over else 0.0)


def _kept_share(span: Span, floor: int | None) -> float:
    if floor is None or floor >= span.last or span.last == span.first:
        return 1.0
    return max(0, floor - span.first) / (span.last - span.first)


def _cut(
    pieces: Iterable[tuple[Spent, float]], begin: float, end: float, start: int
) -> Iterable[Segment]:
    """Lay pieces one after the other between two times."""
    at = begin
    for spent, seconds in pieces:
        until = min(end, at + seconds)
        if until > at:
            yield Segment(at, until, spent, start)
            at = until
