"""Snapshots in memory that outlives the worker: a few slots in one file of a memory file system.

A slot is written in three steps: it is marked torn, its bytes are copied, and its header is written
with a checksum and a sequence number. A SIGKILL between any two of them leaves the other slots as
they are. Only the header is checksummed here; whoever publishes a slot digests its content.

Three slots, so that one can be published and one be the newest while one is written. Each writer
locks a file of its own; a file whose writer has died can be read by anybody and written by the
next. Pages are allocated when the file is made, so a full file system is met before training.
"""

import errno
import fcntl
import logging
import mmap
import os
import resource
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b

import xxhash

from trm_dist.checkpoint import replay
from trm_dist.errors import ConfigError

logger = logging.getLogger(__name__)

STALE_S = 3600.0
"""Age after which a file nobody has locked belongs to a run that nobody restarts."""

_MAGIC = b"trm_dist snapshots 2"
_CONTROL = struct.Struct("<20sIQQ")  # magic, slots, bytes of a slot's header, bytes of its body
_SLOT = struct.Struct("<QQQ")  # sequence number (0: torn), bytes of the header, checksum
_PAGE = 4096
_HEADER_GROWTH_BYTES = 4096
"""Room for counters that get longer, a few bytes in the life of a run."""
_MADV_POPULATE_WRITE = 23
_MOST_WRITERS = 64
_MOST_COPIES = 100


@dataclass(frozen=True, slots=True)
class Held:
    """What a slot holds; `body` is a view, valid until the slot is written again."""

    slot: int
    sequence: int
    header: bytes
    body: memoryview
    owner: "Slots"

    def copied(self) -> "Held":
        """Return the newest of the same file as a copy that stays, whoever writes there meanwhile.

        Raises:
            OSError: Its writer is faster than the copy, again and again.
        """
        for _ in range(_MOST_COPIES):
            newest = self.owner.newest()
            if newest is None:
                continue
            body = memoryview(bytearray(newest.body))
            after = self.owner.read(newest.slot)
            if after is not None and after.sequence == newest.sequence:
                return Held(newest.slot, newest.sequence, newest.header, body, self.owner)
        raise OSError(errno.EBUSY, "a snapshot is written over all the time")


class Slots:
    """The slots of one file, which `descriptor` keeps open."""

    def __init__(self, descriptor: int) -> None:
        """Map an allocated file.

        Raises:
            ValueError: It is not one.
        """
        self.descriptor = descriptor
        self.num_slots: int
        self.header_bytes: int
        self.body_bytes: int
        control = os.pread(descriptor, _CONTROL.size, 0)
        if len(control) < _CONTROL.size:
            raise ValueError("too short to hold snapshots")
        magic: bytes
        magic, self.num_slots, self.header_bytes, self.body_bytes = _CONTROL.unpack(control)
        size = self._start(self.num_slots) + replay.NUM_BYTES
        if magic != _MAGIC or os.fstat(descriptor).st_size != size:
            raise ValueError("not a file of snapshots")
        can_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        # A reader's mapping is a private one: torch wants a buffer it could write to.
        access = mmap.ACCESS_WRITE if can_write else mmap.ACCESS_COPY
        self._view = memoryview(mmap.mmap(descriptor, size, access=access))

    @classmethod
    def allocate(
        cls, descriptor: int, *, num_slots: int, header_bytes: int, body_bytes: int
    ) -> "Slots":
        """Give an empty file its slots, every page of them really there.

        Raises:
            OSError: There is not enough memory.
        """
        header_bytes = _whole_pages(header_bytes + _HEADER_GROWTH_BYTES)
        body_bytes = _whole_pages(body_bytes)
        size = _PAGE + num_slots * (_PAGE + header_bytes + body_bytes) + replay.NUM_BYTES
        os.posix_fallocate(descriptor, 0, size)
        slots_control = _CONTROL.pack(_MAGIC, num_slots, header_bytes, body_bytes)
        os.pwrite(descriptor, slots_control, 0)
        return cls(descriptor)

    def touch(self) -> None:
        """Map every page now, so that the first copies need not."""
        with suppress(OSError):  # Linux before 5.14: the first copies are slower
            self._mapping.madvise(_MADV_POPULATE_WRITE)

    def fits(self, *, num_slots: int, header_bytes: int, body_bytes: int) -> bool:
        """Tell whether such snapshots can be written here."""
        return (
            self.num_slots == num_slots
            and self.header_bytes >= header_bytes + _HEADER_GROWTH_BYTES // 2
            and self.body_bytes >= body_bytes
        )

    def begin(self, slot: int) -> memoryview:
        """Mark a slot torn and return its body to copy into."""
        start = self._start(slot)
        _SLOT.pack_into(self._view, start, 0, 0, 0)
        return self._body(start)

    def finish(self, slot: int, sequence: int, header: bytes) -> None:
        """Say what the body holds; the sequence number is written last."""
        assert len(header) <= self.header_bytes, "room was measured before"
        start = self._start(slot)
        self._view[start + _PAGE : start + _PAGE + len(header)] = header
        _SLOT.pack_into(self._view, start, 0, len(header), _checksum(sequence, header))
        struct.pack_into("<Q", self._view, start, sequence)
        os.utime(self.descriptor)  # a write through a mapping does not say when

    def read(self, slot: int) -> Held | None:
        """Return what a slot holds; None when it is empty or torn."""
        start = self._start(slot)
        sequence, length, checksum = _SLOT.unpack_from(self._view, start)
        if not sequence or length > self.header_bytes:
            return None
        header = bytes(self._view[start + _PAGE : start + _PAGE + length])
        if _checksum(sequence, header) != checksum:
            return None
        return Held(slot, sequence, header, self._body(start), self)

    def held(self) -> list[Held]:
        """Return what all slots hold, the oldest first."""
        found = [each for each in map(self.read, range(self.num_slots)) if each]
        return sorted(found, key=lambda each: each.sequence)

    def newest(self) -> Held | None:
        """Return the slot that was written last."""
        return next(reversed(self.held()), None)

    @property
    def whole(self) -> memoryview:
        """All of the memory, slots and what is around them."""
        return self._view

    @property
    def loss_log(self) -> memoryview:
        """Room behind the slots for the losses of batches; see `replay`."""
        return self._view[self._start(self.num_slots) :]

    @property
    def _mapping(self) -> mmap.mmap:
        mapping = self._view.obj
        assert isinstance(mapping, mmap.mmap)
        return mapping

    def _start(self, slot: int) -> int:
        return _PAGE + slot * (_PAGE + self.header_bytes + self.body_bytes)

    def _body(self, start: int) -> memoryview:
        first = start + _PAGE + self.header_bytes
        return self._view[first : first + self.body_bytes]


class SnapshotDir:
    """The files of one store's runs in a directory of a memory file system."""

    def __init__(self, directory: str, identity: str) -> None:
        """Name the files.

        Args:
            directory: Such as /dev/shm.
            identity: Of the store.
        """
        self.directory = directory
        self._mine = f"trm_dist-{os.getuid()}-"
        self._prefix = f"{self._mine}{blake2b(identity.encode(), digest_size=8).hexdigest()}-"

    def held(self) -> Iterator[Held]:
        """Yield the newest snapshot of every file of this store, whoever wrote it."""
        for path in self._paths(self._prefix):
            with suppress(OSError, ValueError), _opened(path, os.O_RDONLY) as descriptor:
                if newest := Slots(descriptor).newest():
                    yield newest

    def take(self, *, num_slots: int, header_bytes: int, body_bytes: int) -> Slots:
        """Lock a file for as long as this process lives, and give it room.

        A file that was left by a dead writer is taken over with what it holds.

        Raises:
            OSError: There is not enough room, or the directory cannot be written.
        """
        size = {"num_slots": num_slots, "header_bytes": header_bytes, "body_bytes": body_bytes}
        path, descriptor = self._lock_one()
        with suppress(ValueError):
            found = Slots(descriptor)
            if found.fits(**size):
                return found
        # Another process may have the file mapped, so it is not changed but replaced.
        os.unlink(path)
        os.close(descriptor)
        path, descriptor = self._lock_one()
        try:
            slots = Slots.allocate(descriptor, **size)
            slots.touch()
            return slots
        except OSError:
            os.unlink(path)
            os.close(descriptor)
            raise

    def free_bytes(self) -> int:
        """Return what the file system has left; 0 where there is none."""
        try:
            status = os.statvfs(self.directory)
        except OSError:
            return 0
        return status.f_bavail * status.f_frsize

    def reclaim(self, older_than_s: float = STALE_S) -> None:
        """Remove files of any store whose writers are dead and that nobody came back for."""
        for path in self._paths(self._mine):
            with suppress(OSError), _opened(path, os.O_RDONLY) as descriptor:
                status = os.fstat(descriptor)
                is_stale = time.time() - status.st_mtime > older_than_s
                if is_stale and _remove_if_unlocked(descriptor, path):
                    logger.info(
                        "removed %s, a snapshot of %.1f MiB that a dead run has left",
                        path,
                        status.st_size / 2**20,
                    )

    def _lock_one(self) -> tuple[str, int]:
        for number in range(_MOST_WRITERS):
            path = os.path.join(self.directory, f"{self._prefix}{number}")
            with suppress(BlockingIOError, PermissionError):
                descriptor = _open(path, os.O_RDWR | os.O_CREAT)
                if _lock(descriptor, path):
                    return path, descriptor
                os.close(descriptor)
        raise OSError(errno.EMFILE, "too many processes hold snapshots of this store")

    def _paths(self, prefix: str) -> list[str]:
        try:
            names = sorted(os.listdir(self.directory))
        except OSError:
            return []
        return [os.path.join(self.directory, name) for name in names if name.startswith(prefix)]


def take_slots(
    directory: str, identity: str, *, num_slots: int, header_bytes: int, body_bytes: int
) -> Slots:
    """Return slots as good as the machine allows, and say so when that is not as good as asked.

    Args:
        directory: Of a memory file system.
        identity: Of the store.
        num_slots: How many to ask for; 0: none that outlive the workers.
        header_bytes: Length of a header, which may grow a little.
        body_bytes: Room for the tensors of a state.

    Raises:
        ConfigError: A limit forbids files that large.
    """
    own = SnapshotDir(directory, identity)
    own.reclaim()
    size = {"header_bytes": header_bytes, "body_bytes": body_bytes}
    trouble: OSError | None = None
    for number in range(num_slots, 1, -1):
        try:
            slots = own.take(num_slots=number, **size)
        except OSError as error:
            trouble = trouble or error
            continue
        if trouble:
            logger.warning(
                "%s: only %d of %d memory snapshots of %.1f MiB fit (%s; %.1f MiB free). While one "
                "is published, a kill in the middle of a copy may cost finished batches. Make it "
                "larger, or give --snapshot-slots %d or another --snapshot-dir.",
                directory, number, num_slots, body_bytes / 2**20, trouble.strerror,
                own.free_bytes() / 2**20, number,
            )  # fmt: skip
        return slots
    if num_slots and not (trouble and trouble.errno == errno.EFBIG):
        logger.warning(
            "%s: not even two memory snapshots of %.1f MiB fit (%s; %.1f MiB free), so a worker "
            "that is killed costs what was trained since the last checkpoint. Make it larger, give "
            "another --snapshot-dir, or say --snapshot-slots 0.",
            directory, body_bytes / 2**20, trouble.strerror if trouble else "one is asked for",
            own.free_bytes() / 2**20,
        )  # fmt: skip
    return private_slots(num_slots=2, **size)


def private_slots(*, num_slots: int, header_bytes: int, body_bytes: int) -> Slots:
    """Return slots that only this process and whoever it hands them to can see.

    Raises:
        ConfigError: A limit forbids files that large, to memory and checkpoints alike.
    """
    descriptor = os.memfd_create("trm_dist-snapshots")
    try:
        return Slots.allocate(
            descriptor, num_slots=num_slots, header_bytes=header_bytes, body_bytes=body_bytes
        )
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise ConfigError(
            f"{num_slots} memory snapshots of {body_bytes / 2**20:.1f} MiB are larger than a file "
            f"may be here ({resource.getrlimit(resource.RLIMIT_FSIZE)[0]} bytes). Raise that limit "
            "(ulimit -f)."
        ) from error


def reopened(slots: Slots) -> int:
    """Return another descriptor of the same file, for reading, without this process's lock."""
    return os.open(f"/proc/self/fd/{slots.descriptor}", os.O_RDONLY)


def remove_if_unlocked(slots: Slots) -> None:
    """Remove the file of slots, unless another process has locked it."""
    _remove_if_unlocked(slots.descriptor, os.readlink(f"/proc/self/fd/{slots.descriptor}"))


def _open(path: str, flags: int) -> int:
    """Open a file that is ours; the directory is open to everybody."""
    # A pipe that somebody else has put there must not keep us waiting.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(descriptor)
    if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "belongs to somebody else", path)
    return descriptor


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_if_unlocked(descriptor: int, path: str) -> bool:
    if is_ours := _lock(descriptor, path):
        os.unlink(path)
    return is_ours


def _lock(descriptor: int, path: str) -> bool:
    """Lock a file, unless another process has or it was removed or replaced meanwhile."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        return False


def _checksum(sequence: int, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(header, seed=sequence)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
