"""Where checkpoints lie: a few atomic verbs, and a local directory behind them.

Locations are URL strings. The top level of a store holds documented names and nothing else; all
else (temporary files, run.json, locks) lies in `.trm_dist/` below it, so that a clean-up of the
directory by hand never hurts a run.

fsspec's own local writes truncate in place and never reach the disk for sure, so the local store
does the four steps itself: write aside, flush to disk, rename, flush the directory.
"""

import errno
import fcntl
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

HIDDEN = ".trm_dist"
"""Folder of a store for everything that is not a checkpoint."""

LOCK_WAIT_S = 30.0
"""How long another process may hold the lock of a directory, which it needs for microseconds."""

_TEMPORARY = "tmp-"

Guard = Callable[[], None]
"""Asked last, right before new content becomes visible; raises to keep the old one."""


def unguarded() -> None:
    """Let any content become visible."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a store."""

    name: str
    size_bytes: int
    modified_s: float
    """Seconds since the epoch."""


@runtime_checkable
class Store(Protocol):
    """Atomic storage of named bytes. All errors are OSErrors of the usual kinds."""

    url: str
    """Location, for messages."""
    identity: str
    """Location, the same however it is spelled."""

    def entries(self, folder: str = "") -> list[Entry]:
        """List the top level or a folder, by names within it.

        A store that does not exist yet is empty; one that fails raises.
        """
        ...

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Read a small range of a file; a negative `start` counts from its end.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def view(self, name: str) -> memoryview:
        """Return a whole file in memory that may be written to, at the least cost.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        """Write a whole file, given as pieces in their order.

        Once this returns it is durable; before, or when it raises, the old one stands.
        """
        ...

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Write a small file only if it still holds `expected` (None: does not exist).

        Returns:
            Whether it was written.
        """
        ...

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        """Make `target` a real file with the content of `source`, atomically.

        Raises:
            FileNotFoundError: `source` is gone.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a file; one that is already gone is fine."""
        ...

    def leftovers(self) -> list[str]:
        """Name what writers that died have left unfinished."""
        ...

    def remove_leftovers(self) -> None:
        """Remove that. For the one writer only."""
        ...

    def check_writable(self) -> None:
        """Raise if nothing could be written; leave nothing behind."""
        ...

    def free_bytes(self) -> int | None:
        """Return the free space; None where there is no such limit."""
        ...


class LocalStore:
    """A directory of a local or shared file system."""

    def __init__(self, path: str) -> None:
        self.url = path
        self.identity = os.path.realpath(path)

    def entries(self, folder: str = "") -> list[Entry]:
        """List the files of the directory."""
        found = []
        path = os.path.join(self.url, folder) if folder else self.url
        with suppress(FileNotFoundError), os.scandir(path) as listing:
            for each in listing:
                with suppress(FileNotFoundError):  # removed by hand while we look
                    if each.is_file():
                        status = each.stat()
                        found.append(Entry(each.name, status.st_size, status.st_mtime))
        return found

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Read a range of a file."""
        with open(self._path(name), "rb") as file:
            file.seek(start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start))
            return file.read(-1 if num_bytes is None else num_bytes)

    def view(self, name: str) -> memoryview:
        """Map a file, privately; what is published is never changed in place."""
        with open(self._path(name), "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(bytearray())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        """Write aside, flush, rename, flush the directory."""
        with self._temporary() as temporary:
            os.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for piece in pieces:
                    _write_all(descriptor, memoryview(piece))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._move_into_place(temporary, name, guard)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Write with a guard that compares."""

        def compare() -> None:
            try:
                current: bytes | None = self.read(name)
            except FileNotFoundError:
                current = None
            if current != expected:
                raise _ChangedError

        try:
            self.put(name, [data], compare)
        except _ChangedError:
            return False
        return True

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        """Make a hard link beside and rename it; copy where there are no links."""
        with self._temporary() as temporary:
            try:
                os.link(self._path(source), temporary)
            except FileNotFoundError:
                raise
            except OSError:
                self.put(target, [self.read(source)], guard)
                return
            self._move_into_place(temporary, target, guard)

    def delete(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def leftovers(self) -> list[str]:
        """Name the temporary files."""
        try:
            names = os.listdir(self._path(HIDDEN))
        except FileNotFoundError:
            return []
        return [f"{HIDDEN}/{name}" for name in names if name.startswith(_TEMPORARY)]

    def remove_leftovers(self) -> None:
        """Remove the temporary files."""
        for name in self.leftovers():
            self.delete(name)

    def check_writable(self) -> None:
        """Write a nameless file into the directory, or into the one it would be made in."""
        with tempfile.TemporaryFile(dir=self._nearest_existing()):
            pass

    def free_bytes(self) -> int | None:
        """Return what the file system has left for this user."""
        status = os.statvfs(self._nearest_existing())
        return status.f_bavail * status.f_frsize

    def _nearest_existing(self) -> str:
        path = os.path.abspath(self.url)
        while not os.path.exists(path):
            path = os.path.dirname(path)
        return path

    def _path(self, name: str) -> str:
        return os.path.join(self.url, name)

    @contextmanager
    def _temporary(self) -> Iterator[str]:
        """Give a name nobody else uses, and leave nothing behind under it."""
        os.makedirs(self._path(HIDDEN), exist_ok=True)
        path = self._path(f"{HIDDEN}/{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            yield path
        finally:
            # A rename of one link over another of the same file leaves the first in place.
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _move_into_place(self, temporary: str, name: str, guard: Guard) -> None:
        with self._locked():
            guard()
            os.rename(temporary, self._path(name))
        folder = os.open(os.path.dirname(self._path(name)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other process move a file into place meanwhile, so that a guard's answer holds."""
        deadline = time.monotonic() + LOCK_WAIT_S
        path = self._path(f"{HIDDEN}/lock")
        with open(path, "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise TimeoutError(
                            errno.ETIMEDOUT, "another process keeps this lock", path
                        ) from None
                    time.sleep(0.01)
            yield


class _ChangedError(Exception):
    """A file does not hold what was expected."""


def open_store(url: str) -> Store:
    """Open the store at a URL or path.

    Raises:
        ConfigError: There is no store for this kind of URL.
    """
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalStore(url)
    if scheme in {"file", "local"}:
        return LocalStore(path)
    if scheme in {"s3", "s3a"}:  # botocore and fsspec are imported only where they are needed
        from trm_dist.checkpoint.s3 import S3Store

        return S3Store(url)
    from trm_dist.checkpoint.remote import RemoteStore

    return RemoteStore(url)


def _write_all(descriptor: int, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written : written + (1 << 26)])


def split_url(url: str) -> tuple[str, str]:
    """Split the URL of a file into that of its directory and its name."""
    directory, _, name = url.rpartition("/")
    if directory.endswith((":/", "://")) or (url.startswith("/") and not directory):
        directory += "/"  # the root of a file system, or no place at all
    return directory or ".", name
