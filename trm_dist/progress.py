"""How far a run has come: the counters in every snapshot, checkpoint, log line and metric."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class Progress:
    """A batch boundary of a run. Pure: `advance` returns the next one."""

    epoch: int = 1
    """Current epoch, from 1."""
    batch_idx: int = 0
    """Batches completed in this epoch; training goes on with batch `batch_idx`, counted from 0."""
    batch_count: int = 0
    """Batches completed in the run."""
    global_step: int = 0
    """Optimizer steps in the run; one batch makes up to `n_sup` of them."""
    samples_seen: int = 0
    """Samples completed in the run."""

    def at_next_batch(self, batches_per_epoch: int) -> Self:
        """Move to epoch E+1 when epoch E is complete; otherwise stay.

        The boundary after the last batch is kept as (E, number of batches), so that a completed
        epoch has a name of its own; only the batch that follows belongs to the next epoch.
        """
        if self.batch_idx < batches_per_epoch:
            return self
        counters = self.as_dict() | {"epoch": self.epoch + 1, "batch_idx": 0}
        return type(self)(**counters)

    def advance(self, *, samples: int, optimizer_steps: int) -> Self:
        """Return the boundary after one more batch of `samples` samples."""
        return type(self)(
            epoch=self.epoch,
            batch_idx=self.batch_idx + 1,
            batch_count=self.batch_count + 1,
            global_step=self.global_step + optimizer_steps,
            samples_seen=self.samples_seen + samples,
        )

    def is_finished(self, *, epochs: int, batches_per_epoch: int) -> bool:
        """Tell whether `epochs` epochs are complete."""
        return (self.epoch, self.batch_idx) >= (epochs, batches_per_epoch)

    def as_dict(self) -> dict[str, int]:
        """Return the five counters by name."""
        return {name: getattr(self, name) for name in COUNTERS}  # asdict takes ten times as long


COUNTERS = tuple(each.name for each in fields(Progress))
"""Names of the counters."""
