"""The record of a run, `.trm_dist/run.json`: who it is, and which branch is the current one.

A run lives through all its restarts. Going back to an older checkpoint starts a *branch*; the
newest branch is the run's present, older ones keep their files. States are ordered by (branch,
batch_count). The record can be lost: every checkpoint carries what it takes to rebuild it.

It also names the one writer. Whoever becomes the writer takes the next *generation* in one atomic
write; a writer publishes only while the newest generation is its own, so an orphan, a node that
was cut off and came back, or a forgotten process is refused.
"""

import json
import os
import secrets
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from hashlib import blake2b
from typing import Any, Self

from trm_dist.checkpoint.store import HIDDEN, Guard, Store
from trm_dist.errors import FencedError

RECORD = f"{HIDDEN}/run.json"

_MOST_CLAIMS = 100


@dataclass(frozen=True, slots=True)
class Run:
    """One training across all its restarts."""

    run_id: str
    branch: int
    """Current branch, from 1."""
    origin: str
    """Digest of the checkpoint the branch starts from; empty for a branch from nothing."""
    created_at: float
    """Seconds since the epoch."""
    launch_id: str
    """The launch that began this branch; its restarted workers continue it."""
    origin_url: str = ""
    """Names where `origin` lay; the branch goes on when that file has been cleaned up."""
    generation: int = 0
    """Number of the writer, over all branches; 0: none yet."""
    writer: str = ""
    """Host, process, a word of the writer's own, and a mark of its launch."""
    starts_at: int = 0
    """Batches of the run that were complete when its writer has started."""
    failures: int = 0
    """Starts before it at the same place that have failed."""
    preemptions: int = 0
    """Starts before it at the same place that were stopped from outside."""
    was_preempted: bool = False
    """Whether the writer was stopped from outside before it had finished a batch."""

    @classmethod
    def fresh(cls, launch_id: str) -> Self:
        """Begin a run."""
        return cls(uuid.uuid4().hex, 1, "", time.time(), launch_id)

    @classmethod
    def rebuilt(cls, summaries: Iterable[Mapping[str, Any]]) -> Self | None:
        """Rebuild the record from checkpoints: the newest run among them, its newest branch."""
        newest = max(summaries, key=lambda each: (each["created_at"], each["branch"]), default=None)
        if newest is None:
            return None
        created_at = float(newest["created_at"])
        return cls(
            newest["run_id"],
            newest["branch"],
            newest["origin"],
            created_at,
            newest.get("launch_id", ""),
            newest.get("origin_url", ""),
        )

    def next_branch(self, origin: str, origin_url: str, launch_id: str) -> Self:
        """Begin the next branch from the checkpoint with this digest at this place."""
        return replace(
            self,
            branch=self.branch + 1,
            origin=origin,
            origin_url=origin_url,
            launch_id=launch_id,
        )

    def is_that_of(self, summary: Mapping[str, Any]) -> bool:
        """Tell whether a state with this summary is of the same branch of the same run."""
        return (self.run_id, self.branch) == (summary["run_id"], summary["branch"])

    def summary(self) -> dict[str, Any]:
        """Return what every checkpoint of the run says of it."""
        return {name: getattr(self, name) for name in _SUMMARY}

    def after(self, found: "Run | None") -> Self:
        """Return this run as the one that starts after another writer has recorded `found`."""
        generation = max(self.generation, found.generation if found else 0) + 1
        run = replace(self, generation=generation, failures=0, preemptions=0, was_preempted=False)
        if found is None or (found.run_id, found.branch) != (self.run_id, self.branch):
            return run
        if found.starts_at != self.starts_at or not found.writer:
            return run
        return replace(
            run,
            failures=found.failures + (not found.was_preempted),
            preemptions=found.preemptions + found.was_preempted,
        )

    def again(self, starts_at: int) -> Self:
        """Return this run as its writer starts anew, after so many batches."""
        started = replace(self, starts_at=starts_at).after(self)
        return replace(started, generation=self.generation, writer=self.writer)

    def planned_again(self, starts_at: int) -> Self:
        """Return this run as the same start of its writer has planned anew: no failure."""
        if starts_at == self.starts_at:
            return self
        return replace(self, starts_at=starts_at, failures=0, preemptions=0)


_OF_THE_WRITER = {"writer", "starts_at", "failures", "preemptions", "was_preempted"}
_SUMMARY = tuple(each.name for each in fields(Run) if each.name not in _OF_THE_WRITER)


def read_run(store: Store) -> Run | None:
    """Read the record; None when it is missing or cannot be read."""
    return _parse(_read_record(store))


def new_writer(launch_id: str = "") -> str:
    """Return a name for the writer that this process is about to become.

    Args:
        launch_id: Of its launch; see `is_of_launch`.
    """
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}:{_mark(launch_id)}"


def is_of_launch(writer: str, launch_id: str) -> bool:
    """Tell whether a writer belongs to a launch."""
    return writer.rpartition(":")[2] == _mark(launch_id)


def _mark(launch_id: str) -> str:
    return blake2b(launch_id.encode(), digest_size=4).hexdigest()


def claim(store: Store, run: Run, writer: str, *, is_mending: bool = False) -> Run:
    """Become the writer of a store: record the run with the next generation.

    A record that names this writer already stands as it is, so a claim whose answer was lost with
    the process that made it is made once more.

    Args:
        store: To be written.
        run: What it records.
        writer: See `new_writer`.
        is_mending: The store is ours already, and not to be taken from somebody newer.

    Raises:
        OSError: The store cannot be written.
        FencedError: It is not ours any more.
    """
    for _ in range(_MOST_CLAIMS):
        current = _read_record(store)
        found = _parse(current)
        if found and found.writer == writer:
            return found
        if found and is_mending:
            raise _fenced(store, run, found)
        claimed = replace(run.after(found), writer=writer)
        if store.put_if(RECORD, _record_of(claimed), current):
            return claimed
    raise OSError(f"{store.url}/{RECORD} is changed by others all the time")


def record_again(store: Store, run: Run) -> None:
    """Record a run anew whose writer this is; somebody else's record stays.

    Raises:
        OSError: The store cannot be written.
    """
    current = _read_record(store)
    found = _parse(current)
    if found and found.writer == run.writer:
        store.put_if(RECORD, _record_of(run), current)


def excuse(store: Store, run: Run) -> None:
    """Record that the writer of a run was stopped from outside before it had finished a batch.

    Raises:
        OSError: The store cannot be written.
    """
    current = _read_record(store)
    found = _parse(current)
    if found and found.writer == run.writer:
        store.put_if(RECORD, _record_of(replace(found, was_preempted=True)), current)


def guard_of(store: Store, run: Run) -> Guard:
    """Return the guard of a writer: it raises FencedError once another one has taken over.

    A record that was removed by hand stops nobody.
    """

    def check() -> None:
        found = read_run(store)
        if found and (found.generation, found.writer) != (run.generation, run.writer):
            raise _fenced(store, run, found)

    return check


def _fenced(store: Store, run: Run, newer: Run) -> FencedError:
    host, process, _ = (*newer.writer.split(":"), "", "")[:3]
    return FencedError(
        f"{store.url}: another writer has taken over (process {process} on {host}, generation "
        f"{newer.generation}; this one is {run.generation}). This one stops; what it had written "
        "stands, and the other goes on from there.",
        newer.writer,
    )


def _read_record(store: Store) -> bytes | None:
    try:
        return bytes(store.read(RECORD))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _record_of(run: Run) -> bytes:
    return json.dumps(asdict(run), indent=1).encode()


def _parse(record: bytes | None) -> Run | None:
    try:
        run = Run(**json.loads(record)) if record is not None else None
    except (ValueError, TypeError, RecursionError):
        return None
    return run if run and all(_holds(run, each) for each in fields(Run)) else None


def _holds(run: Run, each: Field[Any]) -> bool:
    """Tell whether a field holds what it is for, which nobody else has looked at."""
    return type(getattr(run, each.name)) is each.type
