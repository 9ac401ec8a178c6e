"""Checkpoints at any other URL that fsspec knows: Google's and Azure's storage, memory, ...

It is one whole object per write, because only that is atomic there; a file that is opened, written
and closed is published even when an exception passes through it. Trying again is left to the file
systems, which know their servers.
"""

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import fsspec

from trm_dist.checkpoint.store import HIDDEN, Entry, Guard, unguarded
from trm_dist.errors import ConfigError

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


class RemoteStore:
    """A directory of a file system of fsspec.

    Raises:
        ConfigError: There is no such kind of file system, or its settings cannot work.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if "::" in url:
            raise ConfigError(
                f"{url} looks at a store through another file system, which may show old files. "
                "Give the URL of the store itself."
            )
        try:
            # An instance of our own, that remembers no listing.
            self._files, self._path = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(
                f"{url} cannot be used: {error}. Check the URL, the package and its settings."
            ) from error
        if not self._path.strip("/"):
            raise ConfigError(f"{url} names no place. Write {url.partition(':')[0]}://BUCKET/PATH.")
        self.identity = str(self._files.unstrip_protocol(self._path))

    def entries(self, folder: str = "") -> list[Entry]:
        """List the directory."""
        try:
            with self._errors(folder) as path:
                found = self._files.ls(path if folder else self._path, detail=True)
        except FileNotFoundError:
            return []
        return [
            Entry(each["name"].rpartition("/")[2], each["size"], _time(each))
            for each in found
            if each["type"] == "file"
        ]

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Read a range of a file."""
        with self._errors(name) as path:
            if start == 0 and num_bytes is None:
                return bytes(self._files.cat_file(path))
            size = self._files.info(path)["size"]
            first = min(start if start >= 0 else max(0, size + start), size)
            end = size if num_bytes is None else min(size, first + num_bytes)
            data = bytes(self._files.cat_file(path, first, end)) if first < end else b""
        if len(data) != end - first:
            raise OSError(errno.EIO, f"{len(data)} of {end - first} bytes came", path)
        return data

    def view(self, name: str) -> memoryview:
        """Read a whole file."""
        return memoryview(bytearray(self.read(name)))

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        """Write the whole file at once."""
        data = b"".join(pieces)
        guard()
        with self._errors(name) as path:
            self._files.pipe_file(path, data)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Compare, then write; between the two there is a moment."""
        try:
            current: bytes | None = self.read(name)
        except FileNotFoundError:
            current = None
        if current != expected:
            return False
        self.put(name, [data])
        return True

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        """Let the file system copy."""
        with self._errors(source) as path:
            self._files.info(path)  # a guard is asked only if there is something to copy
        guard()
        with self._errors(source) as path:
            self._files.cp_file(path, f"{self._path}/{target}")

    def delete(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError), self._errors(name) as path:
            self._files.rm_file(path)

    def leftovers(self) -> list[str]:
        """Name nothing: what was not written whole is not there."""
        return []

    def remove_leftovers(self) -> None:
        """Do nothing."""

    def check_writable(self) -> None:
        """Write a small file and remove it."""
        name = f"{HIDDEN}/check-{secrets.token_hex(8)}"
        self.put(name, [b"Can this be written?"])
        self.delete(name)

    def free_bytes(self) -> int | None:
        """Return None: nobody tells."""
        return None

    @contextmanager
    def _errors(self, name: str) -> Iterator[str]:
        """Give the path of a file, and make an OSError of whatever is raised."""
        path = f"{self._path}/{name}".rstrip("/")
        try:
            yield path
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def _time(info: dict[str, Any]) -> float:
    """Return when a file was written; each file system has a name of its own for it."""
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if value is not None:
            return value.timestamp() if isinstance(value, datetime) else float(value)
    return 0.0
