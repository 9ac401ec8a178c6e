"""Encoded data on this node's disk, memory-mapped: made once, whatever is restarted or killed.

An entry is a directory named by what its content depends on: the file's identity (path, size,
times, or the entity tag of an object) and the encoding. It is made under another name, under a lock
that one process holds while the others wait, and renamed when it is whole and flushed; what a
killed process has left is made anew. Entries are removed when all of them together are too large,
the one that was not used for the longest time first, and never one that is in use.
"""

import fcntl
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO, Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

VERSION = 3
"""Of the form of entries; a newer trm_dist does not read what an older one has made."""

_INPUTS, _LABELS, _PUZZLES = "inputs.u8", "labels.u8", "puzzles.i32"
_META = "meta.json"
_PARTIAL, _MAKING, _IN_USE = ".partial", ".making", ".in-use"
_TELL_EVERY_S = 10.0
_WAIT_S = 0.05

_in_use: list[int] = []
"""Shared locks of this process, held to its end."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of a data set. N samples, L positions."""

    inputs: npt.NDArray[np.uint8]
    """[N, L]."""
    labels: npt.NDArray[np.uint8]
    """[N, L]."""
    puzzles: npt.NDArray[np.int32] | None
    """Which puzzle each sample belongs to, [N]; None: all to the first."""
    meta: Mapping[str, Any]
    pages: tuple[mmap.mmap, ...]
    """Where the arrays lie."""


class Sink:
    """Takes the samples of an entry, part after part."""

    def __init__(self, inputs: IO[bytes], labels: IO[bytes], puzzles: IO[bytes]) -> None:
        self._inputs, self._labels, self._puzzles = inputs, labels, puzzles
        self.num_samples = 0
        self.seq_len = 0

    def write(
        self,
        inputs: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.uint8],
        puzzles: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Append samples, both [n, L], and their puzzles, [n], for all samples or for none."""
        self.num_samples += len(inputs)
        self.seq_len = inputs.shape[1]
        self._inputs.write(inputs.tobytes())
        self._labels.write(labels.tobytes())
        if puzzles is not None:
            self._puzzles.write(puzzles.astype("<i4").tobytes())


Build = Callable[[Sink], Mapping[str, Any]]
"""Fills an entry and returns what else to keep of it, as JSON can say it."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Where entries are kept."""

    directory: str
    limit_bytes: int
    """How large all entries together may be; a single one may be larger."""


def default_directory() -> str:
    """Return where users keep caches, after the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "trm_dist")


def cached(cache: Cache, key: Mapping[str, Any], build: Build) -> Entry:
    """Return an entry, which is made if it is not there.

    Args:
        cache: Where it is kept.
        key: What its content depends on.
        build: Makes it.

    Raises:
        OSError: The directory cannot be written.
    """
    text = json.dumps({**key, "version": VERSION}, sort_keys=True)
    name = blake2b(text.encode(), digest_size=16).hexdigest()
    os.makedirs(cache.directory, mode=0o700, exist_ok=True)
    path = os.path.join(cache.directory, name)
    while True:
        lock = _locked(path + _IN_USE, fcntl.LOCK_SH)
        if entry := _open(path):
            _in_use.append(lock)
            return entry
        os.close(lock)
        making = _locked(path + _MAKING, fcntl.LOCK_EX)
        try:
            if _open(path) is None:
                _make(path, build)
        finally:
            os.close(making)
        _trim(cache, keep=name)


def _open(path: str) -> Entry | None:
    """Map an entry; None: it is not there, or not whole."""
    try:
        with open(os.path.join(path, _META), encoding="utf-8") as file:
            meta = json.load(file)
        shape = meta["num_samples"], meta["seq_len"]
        names = (_INPUTS, _LABELS, *([_PUZZLES] if meta["has_puzzles"] else []))
        pages = tuple(_map(os.path.join(path, name)) for name in names)
        inputs, labels = (np.frombuffer(each, np.uint8).reshape(shape) for each in pages[:2])
        puzzles = None
        if meta["has_puzzles"]:
            puzzles = np.frombuffer(pages[2], "<i4").astype(np.int32, copy=False).reshape(shape[0])
        os.utime(path)  # it was used
    except (OSError, ValueError, KeyError):
        return None
    return Entry(inputs, labels, puzzles, meta, pages)


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _make(path: str, build: Build) -> None:
    partial = path + _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    os.mkdir(partial)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(open(os.path.join(partial, name), "wb"))
                for name in (_INPUTS, _LABELS, _PUZZLES)
            ]
            sink = Sink(*files)
            meta = dict(build(sink))
            meta |= {
                "num_samples": sink.num_samples, "seq_len": sink.seq_len,
                "has_puzzles": files[2].tell() > 0,
            }  # fmt: skip
            with open(os.path.join(partial, _META), "w", encoding="utf-8") as file:
                json.dump(meta, file)
                for each in (*files, file):
                    each.flush()
                    os.fsync(each.fileno())
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# -- locks -----------------------------------------------------------------------------------------


def _locked(path: str, kind: int) -> int:
    """Return a descriptor that holds a lock until it is closed."""
    told_s = time.monotonic()
    while True:
        lock = _try_lock(path, kind)
        if lock is not None:
            return lock
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            logger.info("waiting for another process, which is encoding the data")
        time.sleep(_WAIT_S)


def _try_lock(path: str, kind: int) -> int | None:
    """Lock a file, unless somebody else has, or removes it just now."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    os.close(lock)
    return None


# -- what is there ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry, or what is left of one, as people see it."""

    name: str
    url: str
    """Of the data; empty: it was never completed."""
    num_bytes: int
    used_at: float
    """Seconds since the epoch."""


def kept(directory: str) -> list[Kept]:
    """Return what is in the cache, the most recently used first."""
    found: list[Kept] = []
    with suppress(FileNotFoundError):
        found = [_describe(each) for each in os.scandir(directory) if each.is_dir()]
    return sorted(found, key=lambda each: each.used_at, reverse=True)


def _describe(entry: "os.DirEntry[str]") -> Kept:
    try:
        with open(os.path.join(entry.path, _META), encoding="utf-8") as file:
            url = str(json.load(file)["url"])
    except (OSError, ValueError, KeyError):
        url = ""
    num_bytes = 0
    for each in os.scandir(entry.path):
        with suppress(FileNotFoundError):
            num_bytes += each.stat().st_size
    return Kept(entry.name, url, num_bytes, entry.stat().st_mtime)


def remove(directory: str, name: str) -> bool:
    """Remove an entry; tells whether it could be: not while it is in use."""
    path = os.path.join(directory, name.removesuffix(_PARTIAL))
    locks = [_try_lock(path + kind, fcntl.LOCK_EX) for kind in (_MAKING, _IN_USE)]
    is_free = None not in locks
    if is_free:
        for each in (path, path + _PARTIAL):
            shutil.rmtree(each, ignore_errors=True)
        for kind in (_MAKING, _IN_USE):
            os.unlink(path + kind)
    for lock in locks:
        if lock is not None:
            os.close(lock)
    return is_free


def _trim(cache: Cache, keep: str) -> None:
    """Remove what was not used for the longest time until all fit."""
    entries = kept(cache.directory)
    total = sum(each.num_bytes for each in entries)
    for each in reversed(entries):
        if total <= cache.limit_bytes:
            return
        if each.name != keep and remove(cache.directory, each.name):
            total -= each.num_bytes
