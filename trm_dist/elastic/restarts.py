"""How often a run is started again: as long as batches are finished in between."""

from dataclasses import dataclass

LONGEST_PAUSE_S = 60.0


@dataclass(slots=True)
class Budget:
    """Counts failures since the last new batch; a preemption or a lost node is none."""

    limit: int
    """Failures without a new batch after which to give up; 0: never."""
    failures: int = 0
    batch_count: int = -1

    def fail(self, batch_count: int) -> None:
        """Count a failure that came after so many batches of the run."""
        self.failures = self.failures + 1 if batch_count <= self.batch_count else 1
        self.batch_count = max(self.batch_count, batch_count)

    @property
    def is_spent(self) -> bool:
        """Whether it is time to give up."""
        return 0 < self.limit <= self.failures


def pause_s(failures: int) -> float:
    """Return how long to wait before the next start: not after a first failure, then longer."""
    return min(2.0 ** (failures - 2), LONGEST_PAUSE_S) if failures > 1 else 0.0
