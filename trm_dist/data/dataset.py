"""Data sets as arrays: what a run trains on, with the fingerprint that a resume compares."""

import hashlib
import logging
import mmap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from trm_dist import __version__
from trm_dist.data import codec, sudoku
from trm_dist.data.cache import Build, Cache, Entry, Sink, cached
from trm_dist.data.records import RecordFile, identity
from trm_dist.errors import DataError

logger = logging.getLogger(__name__)

Overlong = Literal["truncate", "drop"]
Item = TypeVar("Item")

SUDOKU_SCHEME = "sudoku4:"
DEFAULT_TEXT_LENGTH = 256
_PART = 4096
"""Records that are encoded at a time."""
_TELL_EVERY_S = 5.0
_SIDES = {"train": (False, 20_000), "test": (True, 1_000)}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples of one length. N samples, L positions."""

    url: str
    inputs: npt.NDArray[np.uint8]
    """Tokens of the question, [N, L]."""
    labels: npt.NDArray[np.int16]
    """Tokens of the answer, [N, L]; -100 where a position does not count."""
    num_tokens: int
    codec: str
    sha256: str
    """Of the content."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts worth telling: truncated, dropped and skipped records."""
    pages: tuple[mmap.mmap, ...] = ()
    """Where the arrays lie, if they are mapped."""

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return len(self.inputs)

    @property
    def seq_len(self) -> int:
        """Positions of a sample."""
        return int(self.inputs.shape[1])

    def rows(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return inputs and labels of some samples, both int64 [len(samples), L]."""
        rows = self.inputs[samples].astype(np.int64), self.labels[samples].astype(np.int64)
        for each in self.pages:
            # They stay in the kernel's cache; this process does not grow with the data.
            each.madvise(mmap.MADV_DONTNEED)
        return rows

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the data set."""
        return {
            "url": self.url,
            "sha256": self.sha256,
            "num_samples": self.num_samples,
            "codec": self.codec,
            "num_tokens": self.num_tokens,
        }


def open_dataset(
    url: str, *, seq_len: int, overlong: Overlong, cache: Cache | None = None
) -> Dataset:
    """Open a data set by its URL.

    Args:
        url: `sudoku4:train` or `sudoku4:test`, with `?count=N&seed=N` if wanted; else a file of
            text records.
        seq_len: Wanted length; 0: what the data need.
        overlong: What happens to text that is longer.
        cache: Where to keep what was encoded; None: nowhere.

    Raises:
        DataError: The data are missing, broken, empty or do not fit.
    """
    is_sudoku = url.startswith(SUDOKU_SCHEME)
    seq_len = seq_len or (sudoku.NUM_CELLS if is_sudoku else DEFAULT_TEXT_LENGTH)
    if found := _preloaded.get((url, seq_len, overlong)):
        return found
    key, build = _sudoku(url, seq_len) if is_sudoku else _text(url, seq_len, overlong)
    entry = _cached(cache, key, build) if cache and key else _in_memory(build)
    meta = entry.meta
    return Dataset(
        url=url,
        inputs=entry.inputs,
        labels=entry.labels,
        num_tokens=meta["num_tokens"],
        codec=meta["codec"],
        sha256=meta["sha256"],
        notes=meta["notes"],
        pages=entry.pages,
    )


_preloaded: dict[tuple[str, int, str], Dataset] = {}


def preload(url: str, *, seq_len: int, overlong: Overlong, cache: Cache | None) -> None:
    """Open a data set for the processes that are forked from this one; they share its memory.

    Only local ones: a connection must not be forked. What is wrong with it is for them to say.
    """
    if "://" in url:
        return
    with suppress(DataError):
        dataset = open_dataset(url, seq_len=seq_len, overlong=overlong, cache=cache)
        _preloaded[url, dataset.seq_len, overlong] = dataset


def _cached(cache: Cache, key: Mapping[str, Any], build: Build) -> Entry:
    try:
        return cached(cache, {**key, "trm_dist": __version__}, build)
    except OSError as error:
        logger.warning(
            "--cache-dir %s cannot be used (%s): the data are encoded at every start and kept in "
            "memory",
            cache.directory,
            error,
        )
        return _in_memory(build)


def _in_memory(build: Build) -> Entry:
    parts: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]] = []

    class Memory(Sink):
        def __init__(self) -> None:
            """Keep what is written."""

        def write(self, inputs: npt.NDArray[np.uint8], labels: npt.NDArray[np.int16]) -> None:
            parts.append((inputs, labels))

    meta = build(Memory())
    inputs, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Entry(inputs, labels, meta, ())


def _sudoku(url: str, seq_len: int) -> tuple[dict[str, Any] | None, Build]:
    if seq_len != sudoku.NUM_CELLS:
        raise DataError(
            f"--seq-len {seq_len} does not fit {url}: a 4x4 puzzle has {sudoku.NUM_CELLS} cells. "
            "Leave the flag out."
        )

    def build(sink: Sink) -> dict[str, Any]:
        puzzles = _draw(url)
        sink.write(puzzles.questions, puzzles.solutions.astype(np.int16))
        content = hashlib.sha256(puzzles.questions.tobytes() + puzzles.solutions.tobytes())
        return {
            "url": url,
            "num_tokens": sudoku.NUM_TOKENS,
            "codec": "sudoku4",
            "sha256": content.hexdigest(),
            "notes": {},
        }

    return {"url": url}, build


def _draw(url: str) -> sudoku.Puzzles:
    side, _, query = url.removeprefix(SUDOKU_SCHEME).partition("?")
    try:
        held_out, count = _SIDES[side]
        wanted = {"count": count, "seed": 0}
        for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            wanted[name] = {"count": int, "seed": int}[name](value)
        return sudoku.draw(wanted["count"], seed=wanted["seed"], held_out=held_out)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"--dataset {url}: this is not a set of puzzles ({error}). Write sudoku4:train or "
            f"sudoku4:test, and if wanted ?count=N&seed=N with N up to {sudoku.MAX_PUZZLES}."
        ) from error


def _text(url: str, seq_len: int, overlong: Overlong) -> tuple[dict[str, Any] | None, Build]:
    found = identity(url)

    def build(sink: Sink) -> dict[str, Any]:
        file = RecordFile(url, _Progress(url, found["size"] if found else None))
        num_cut = num_kept = 0
        for part in batched(_encoded(file, seq_len), _PART):
            num_cut += sum(each.is_cut for each in part)
            fits = [each for each in part if overlong == "truncate" or not each.is_cut]
            num_kept += len(fits)
            if fits:
                sink.write(
                    np.stack([each.inputs for each in fits]),
                    np.stack([each.labels for each in fits]),
                )
        if not num_kept:
            raise DataError(
                f"{url}: all {num_cut} records are longer than --seq-len {seq_len}, and "
                "--overlong drop leaves none. Raise --seq-len, or use --overlong truncate."
            )
        return {
            "url": url,
            "num_tokens": codec.NUM_TOKENS,
            "codec": "bytes",
            "sha256": file.sha256,
            "notes": {
                "truncated": num_cut if overlong == "truncate" else 0,
                "dropped": num_cut if overlong == "drop" else 0,
                "skipped": file.num_skipped,
            },
        }

    key = found and {**found, "codec": "bytes", "seq_len": seq_len, "overlong": overlong}
    return key, build


def _encoded(file: RecordFile, seq_len: int) -> Iterator[codec.Encoded]:
    for record in file:
        yield codec.encode(record.context, record.query, record.completion, seq_len)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


class _Progress:
    """Tells now and then how much of a large file is encoded."""

    def __init__(self, url: str, num_bytes: int | None) -> None:
        self._url, self._num_bytes = url, num_bytes
        self._started_s = self._told_s = time.monotonic()

    def __call__(self, num_read: int) -> None:
        now = time.monotonic()
        if now - self._told_s < _TELL_EVERY_S:
            return
        self._told_s = now
        share = f" ({100 * num_read / self._num_bytes:.0f} %)" if self._num_bytes else ""
        rate = num_read / (now - self._started_s)
        logger.info(
            "encoding %s: %.1f MiB%s, %.1f MiB/s", self._url, num_read / 2**20, share, rate / 2**20
        )
