"""How far a long encoding has come: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SILENT_S = 1.0
"""What is done sooner shows no bar."""


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar without threads or processes of its own: workers may be forked from this one."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


class Meter:
    """Tells how much of something large is done; a context manager, as the bar must go.

    It is called with what is done so far.
    """

    def __init__(self, url: str, total: int | None, unit: str, *, every_s: float = 5.0) -> None:
        """Begin to count.

        Args:
            url: What is encoded.
            total: How much there is, if that is known.
            unit: Of the amounts, in the plural.
            every_s: Seconds between lines.
        """
        self._url, self._total, self._unit = url, total, unit
        self._every_s = every_s
        self._started_s = self._told_s = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = _Bar(
                desc=f"encoding {url}", total=total, unit=f" {unit}", unit_scale=True,
                delay=_SILENT_S, leave=False, dynamic_ncols=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int) -> None:
        """Tell that so much is done, unless something was told just before."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._told_s < self._every_s:
            return
        self._told_s = now
        share = f" ({100 * done / self._total:.0f} %)" if self._total else ""
        rate = done / (now - self._started_s)
        logger.info(
            "encoding %s: %s %s%s, %s a second",
            self._url, f"{done:,}", self._unit, share, f"{rate:,.0f}",
        )  # fmt: skip
