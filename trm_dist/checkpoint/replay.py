"""The losses of the latest batches, bit by bit, in memory that outlives the worker.

A batch that is trained once more after a restart must give the bits it gave before. So every replay
is a check of the machine, of its environment, and of this program.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

CAPACITY = 4096
"""Batches that are remembered."""

_RECORD = struct.Struct("<QQQd")  # batch count (0: torn), subject, environment, loss
NUM_BYTES = CAPACITY * _RECORD.size


@dataclass(frozen=True, slots=True)
class Difference:
    """A replayed batch that came out otherwise."""

    before: float
    """The loss it gave then."""
    is_other_environment: bool
    """Whether it ran in another environment then."""


class LossLog:
    """A ring of records in a buffer, one for each batch."""

    def __init__(
        self, buffer: memoryview, subject: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        """Go on with what the buffer holds.

        Args:
            buffer: `NUM_BYTES`, zeros when new.
            subject: What must be the same for two losses to be comparable.
            environment: What the last bits may depend on besides.
        """
        self._buffer = buffer
        self._subject, self._environment = _key(subject), _key(environment)

    def check(self, batch_count: int, loss: float) -> Difference | None:
        """Compare a batch with what it gave before, if that is known, and remember it."""
        start = batch_count % CAPACITY * _RECORD.size
        count, subject, environment, before = _RECORD.unpack_from(self._buffer, start)
        _RECORD.pack_into(self._buffer, start, 0, self._subject, self._environment, loss)
        struct.pack_into("<Q", self._buffer, start, batch_count)
        if (count, subject) != (batch_count, self._subject) or _bits(before) == _bits(loss):
            return None
        return Difference(before, environment != self._environment)


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)


def _key(content: Mapping[str, Any]) -> int:
    text = json.dumps(content, sort_keys=True).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
