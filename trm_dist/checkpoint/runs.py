"""The record of a run, `.trm_dist/run.json`: who it is, and which branch is the current one.

A run lives through all its restarts. Going back to an older checkpoint starts a *branch*; the
newest branch is the run's present, older ones keep their files. States are ordered by (branch,
batch_count). The record can be lost: every checkpoint carries what it takes to rebuild it.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from trm_dist.checkpoint.store import HIDDEN, Store

RECORD = f"{HIDDEN}/run.json"


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

    def summary(self) -> dict[str, Any]:
        """Return what every checkpoint of the run says of it."""
        return asdict(self)


def read_run(store: Store) -> Run | None:
    """Read the record; None when it is missing or cannot be read."""
    try:
        return Run(**json.loads(store.read(RECORD)))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def write_run(store: Store, run: Run) -> None:
    """Write the record durably; a record that already says so is left alone."""
    if read_run(store) != run:
        store.put(RECORD, json.dumps(asdict(run), indent=1).encode())
