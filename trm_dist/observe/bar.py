"""The live bar of a terminal: one line that says how it goes, redrawn in place.

A thread of its own draws it, so training never waits for a terminal, and the age of the newest
checkpoint grows while a batch takes long. The cursor goes back to the start of the line each time:
what another process writes there, such as torchrun of a worker that was killed, begins a line.
Log records of this program clear the line first (see `logs`).
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from trm_dist import events
from trm_dist.events import Event
from trm_dist.observe.rate import Rate, duration

_REDRAW_S = 0.25
_USUAL = 80
_WIDE = 120
"""Columns from which on words are spelled out."""


class Bar:
    """A listener that shows the newest values; the bar is there from the start of training on."""

    def __init__(
        self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Get ready; nothing is drawn.

        Args:
            file: A terminal; left out, stderr.
            clock: Seconds.
        """
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._rate = Rate()
        self._line: _Line | None = None
        self._ended = threading.Event()
        self._total_epochs = self._world_size = self._restarts = 0
        self._total_batches = 0
        self._batch: events.Batch | None = None
        self._committed: tuple[int, float] | None = None

    def __call__(self, event: Event) -> None:
        """Take over what an event says; draw at the first, and for the last time at the last."""
        if isinstance(event, events.Started):
            self._start(event)
        elif isinstance(event, events.Batch):
            self._batch = event
            self._rate.add(event.num_samples, event.seconds)
        elif isinstance(event, events.Committed):
            self._committed = event.progress.batch_count, self._clock()
        if self._line and not isinstance(event, events.Committed):  # which tells of the past
            self._line.n = event.progress.batch_count
            self._line.epoch = event.progress.epoch
        if self._line and isinstance(event, events.Stopped | events.Finished):
            self._ended.set()
            with suppress(OSError):  # a terminal that takes nothing ends nothing
                self._line.close()

    def _start(self, event: events.Started) -> None:
        self._total_batches = event.total_batches
        self._total_epochs = event.total_batches // event.batches_per_epoch
        self._world_size, self._restarts = event.world_size, event.restarts
        tqdm.set_lock(threading.RLock())  # its own would be shared with other processes
        tqdm.monitor_interval = 0
        with suppress(OSError):
            self._line = _Line(self._file, event.total_batches, self._values)
        threading.Thread(target=self._keep_drawing, name="bar", daemon=True).start()

    def _keep_drawing(self) -> None:
        while self._line and not self._ended.wait(_REDRAW_S):
            with suppress(OSError):
                self._line.refresh()

    def _values(self, at: int, epoch: int, columns: int) -> dict[str, str]:
        """Return the texts left and right of the bar."""
        batches, epochs = f"{at}/{self._total_batches}", f"{epoch}/{self._total_epochs}"
        loss = exact = rate = left = "?"
        if self._batch:
            loss = f"{self._batch.loss:.4f}"
            exact = f"{self._batch.exact_accuracy:.3f}"
            rate = f"{self._rate.samples_per_s():.3g}"
            num_samples = (self._total_batches - at) * self._batch.num_samples
            left = duration(self._rate.left_s(num_samples))
        saved = "none since the start", "-"
        if self._committed:
            batch_count, at_s = self._committed
            age = duration(self._clock() - at_s)
            saved = f"{batch_count}, {age} old", f"{batch_count} {age}"
        if columns < _WIDE:
            return {
                "left": f"{epochs} {batches}",
                "right": f"{left} loss {loss} exact {exact} {rate}/s saved {saved[1]} "
                f"{self._world_size}w {self._restarts}r",
            }
        return {
            "left": f"epoch {epochs} batch {batches}",
            "right": f"{left} left, loss {loss} exact {exact}, {rate} samples/s, "
            f"checkpoint {saved[0]}, {self._world_size} worker(s), {self._restarts} restart(s)",
        }


class _Line(tqdm):  # type: ignore[type-arg]
    """tqdm with words of ours, made anew each time it is drawn."""

    def __init__(
        self, file: TextIO, total: int, values: Callable[[int, int, int], dict[str, str]]
    ) -> None:
        self.epoch = 1
        self._own_values = values
        super().__init__(
            total=total, file=file, dynamic_ncols=True, bar_format="{left} |{bar}| {right}"
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's form is filled with."""
        known = dict(super().format_dict)
        if (known["ncols"] or 0) < 1:  # a terminal that does not know its size
            known["ncols"] = _USUAL
        return known | self._own_values(int(self.n), self.epoch, known["ncols"])

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw, and take the cursor back."""
        super().display(msg, pos)
        self.fp.write("\r")
