"""The events of a run, one typed stream: log lines read it today, a ledger and metrics can later.

Parts receive an `Emit` and never know who listens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from trm_dist.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a batch boundary."""

    progress: Progress

    def fields(self) -> dict[str, Any]:
        """Return the event as flat plain values, its kind first."""
        values = asdict(self)
        return {"event": type(self).__name__.lower(), **values.pop("progress"), **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """Training starts from `progress`, fresh or resumed."""

    source: str
    """The checkpoint it goes on from; empty: a fresh start."""
    world_size: int
    settings: dict[str, str]
    """Every setting, as "value (origin)"."""
    num_parameters: int
    num_samples: int
    notes: dict[str, int]
    """What was done to the data: records truncated, dropped, skipped."""
    batches_per_epoch: int
    total_batches: int
    restarts: int = 0
    """How often the launcher of this node has started the workers before."""
    generation: int = 0
    """Number of the writer in the run's record."""
    failures: int = 0
    """Starts in a row that had failed without a new batch when the writer was recorded."""
    preemptions: int = 0
    """The same of starts that were stopped from outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Event):
    """A batch is complete. Scores are those of each row at the step at which it finished."""

    loss: float
    token_accuracy: float
    exact_accuracy: float
    mean_steps: float
    lr: float
    num_samples: int
    seconds: float
    has_snapshot: bool = True
    """Whether the state after it was copied into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped(Event):
    """A batch was left early, because a loss or gradient was not finite (--on-nan skip)."""

    samples: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverged(Event):
    """A batch that is trained again after a restart gives another loss than before.

    Told once in each start: what comes after differs too.
    """

    loss: float
    loss_before: float
    is_other_environment: bool
    """Whether it ran on another kind of machine then; if not, a machine has failed, or trm_dist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The averaged weights were evaluated on the whole evaluation set."""

    token_accuracy: float
    exact_accuracy: float
    mean_steps: float
    num_samples: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A checkpoint is durable and visible under these names."""

    names: list[str]
    num_bytes: int
    seconds: float
    """Of the publishing, beside which training goes on."""
    waited_s: float
    """How long training stood still for the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFailed(Event):
    """The store refused a checkpoint; it is tried again."""

    error: str
    num_failures: int
    retry_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The run stops before its end; the same command goes on from `progress`."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The run has reached its total."""

    digest: str
    seconds: float
    """Of this start, without the time before it."""
    samples_per_s: float
    peak_memory_bytes: int


Emit = Callable[[Event], None]
