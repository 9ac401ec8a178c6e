"""A growing file in memory of which a copy is kept next to the checkpoints.

The one who writes it may be killed at any time; who keeps it (the persister) holds it too. What it
says is not looked at here.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from trm_dist.checkpoint.store import HIDDEN, Store

_PREFIX = f"{HIDDEN}/ledger-"


@dataclass(eq=False, slots=True)
class Journal:
    """One such file."""

    name: str
    """Of its copy in the store."""
    descriptor: int
    _kept: bytes = field(default=b"", init=False)

    @classmethod
    def create(cls, started_at: float) -> "Journal":
        """Make an empty one.

        Args:
            started_at: Seconds since the epoch; names sort by it.
        """
        token = os.urandom(4).hex()
        descriptor = os.memfd_create("trm_dist-journal")
        return cls(f"{_PREFIX}{int(started_at * 1000):014d}-{token}.jsonl", descriptor)

    def keep(self, store: Store) -> None:
        """Bring its copy in a store up to date; one attempt.

        Raises:
            OSError: The store failed; the copy is as it was.
        """
        data = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        mark = blake2b(data).digest()
        if mark != self._kept:
            store.put(self.name, [data])
            self._kept = mark

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


def read_journals(store: Store) -> Iterable[bytes]:
    """Yield what all journals in a store say, oldest first.

    Raises:
        OSError: The store cannot be read.
    """
    names = [f"{HIDDEN}/{entry.name}" for entry in store.entries(HIDDEN)]
    for name in sorted(each for each in names if each.startswith(_PREFIX)):
        yield bytes(store.read(name))
