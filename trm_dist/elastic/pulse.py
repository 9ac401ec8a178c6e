"""Signs of life: when each worker of a node last got on, how far it is, and when it counts as hung.

A few bytes in memory that the supervisor shares with its workers; a worker without a supervisor
keeps them for itself. A watchdog ends the worker, with the stacks of all its threads, when there is
no sign for too long.
"""

import faulthandler
import logging
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from trm_dist.elastic.agent import PULSE, record_error
from trm_dist.errors import EXIT_CRASHED, HungError

logger = logging.getLogger(__name__)

START_LIMIT_S = 600.0
"""How long may pass without a sign until the first batch is complete."""
LEAST_LIMIT_S = 120.0
"""The least limit that is found out: a whole machine may stand still while it is moved."""
_TIMES_LONGEST = 20
_BACKSTOP_S = 5.0
_TIMES_LIMIT = 2
"""Who is silent for so many times its limit was not ended by its watchdog either."""

_SLOT = struct.Struct("<ddq")


@dataclass(frozen=True, slots=True)
class Sign:
    """The newest sign of life of a worker."""

    at_s: float
    """Of `time.monotonic`, which is the same for all processes of a node; 0: none yet."""
    limit_s: float
    """After which it counts as hung."""
    batch_count: int


class Pulse:
    """The signs of the workers of a node, of which one is this process."""

    def __init__(self, buffer: mmap.mmap, slot: int = 0, hang_timeout_s: float = 0.0) -> None:
        """Take a slot.

        Args:
            buffer: Of all slots.
            slot: Of this worker.
            hang_timeout_s: After which a worker counts as hung; 0: found out from its longest step.
        """
        self._buffer, self._slot, self._hang_timeout_s = buffer, slot, hang_timeout_s
        self._longest_s = 0.0
        self._first_batch: int | None = None
        self._batch_count = 0
        self.at_s = time.monotonic()

    @classmethod
    def of_worker(cls, environment: Mapping[str, str], slot: int, hang_timeout_s: float) -> Self:
        """Open what the supervisor shares; without one, something private."""
        if PULSE in environment:
            return cls(mmap.mmap(int(environment[PULSE]), 0), slot, hang_timeout_s)
        return cls(mmap.mmap(-1, (slot + 1) * _SLOT.size), slot, hang_timeout_s)

    def beat(self, batch_count: int | None = None) -> None:
        """Leave a sign of life: something was done.

        Args:
            batch_count: Batches of the run that are complete, when that has changed.
        """
        now = time.monotonic()
        if batch_count is not None:
            if self._first_batch is None:
                self._first_batch = batch_count
            self._batch_count = batch_count
        if self._has_trained:
            self._longest_s = max(self._longest_s, now - self.at_s)
        self.at_s = now
        _SLOT.pack_into(
            self._buffer, self._slot * _SLOT.size, now, self.limit_s(), self._batch_count
        )

    @property
    def _has_trained(self) -> bool:
        return self._first_batch is not None and self._batch_count > self._first_batch

    def limit_s(self) -> float:
        """Return how long this worker may go without a sign before it counts as hung."""
        if not self._has_trained:
            return max(self._hang_timeout_s, START_LIMIT_S)
        return self._hang_timeout_s or max(LEAST_LIMIT_S, _TIMES_LONGEST * self._longest_s)

    def signs(self) -> list[Sign]:
        """Return the newest sign of each worker."""
        return [Sign(*values) for values in _SLOT.iter_unpack(self._buffer[:])]

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Tell whether no worker of the node has hung, and what there is to say."""
        now = time.monotonic()
        signs = [each for each in self.signs() if each.at_s]
        is_hung = any(now - each.at_s > _TIMES_LIMIT * each.limit_s for each in signs)
        return not is_hung, {
            "batch_count": max((each.batch_count for each in signs), default=0),
            "seconds_since_sign_of_life": round(max((now - s.at_s for s in signs), default=0), 3),
        }


def new_pulse(num_workers: int) -> tuple[int, Pulse]:
    """Make the memory to share; returns its descriptor too."""
    descriptor = os.memfd_create("trm_dist-pulse")
    os.ftruncate(descriptor, num_workers * _SLOT.size)
    return descriptor, Pulse(mmap.mmap(descriptor, 0))


class Watchdog:
    """Watches this worker's pulse from a thread of its own."""

    def __init__(self, pulse: Pulse, is_excused: Callable[[], bool], rank: int) -> None:
        """Get ready.

        Args:
            pulse: Of this worker.
            is_excused: Tells whether there is a good reason to wait, such as a writer that waits
                for its store.
            rank: To be told.
        """
        self._pulse, self._is_excused, self._rank = pulse, is_excused, rank

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while True:
            limit_s = self._pulse.limit_s()
            left_s = self._pulse.at_s + limit_s - time.monotonic()
            if left_s > 0:
                # Should this thread be kept from running as well, C code does what it would do.
                faulthandler.dump_traceback_later(left_s + limit_s + _BACKSTOP_S, exit=True)
                time.sleep(min(left_s, limit_s / 10, 1.0) + 0.001)
            elif self._excuses():
                self._pulse.beat()
            else:
                self._end(limit_s)

    def _excuses(self) -> bool:
        try:
            return self._is_excused()
        except Exception:  # noqa: BLE001 whoever could excuse it is gone
            return False

    def _end(self, limit_s: float) -> None:
        reason = f"no sign of life for {limit_s:.0f} s (--hang-timeout)"
        logger.error("worker %d: %s; it ends here:", self._rank, reason)
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr)
        record_error(HungError(reason))
        os._exit(EXIT_CRASHED)
