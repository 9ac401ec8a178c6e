"""How fast training is, and how long it will take."""


class Rate:
    """Samples per second over the latest batches, smoothed."""

    def __init__(self) -> None:
        self._samples = self._seconds = 0.0

    def add(self, num_samples: int, seconds: float) -> None:
        """Count a batch."""
        self._samples = 0.95 * self._samples + num_samples
        self._seconds = 0.95 * self._seconds + seconds

    def samples_per_s(self) -> float:
        """Return the rate; 0: no batch yet."""
        return self._samples / self._seconds if self._seconds else 0.0

    def left_s(self, num_samples: int) -> float:
        """Return how long so many samples will take; 0: no batch yet."""
        rate = self.samples_per_s()
        return num_samples / rate if rate else 0.0


def duration(seconds: float) -> str:
    """Return a duration as M:SS or H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
