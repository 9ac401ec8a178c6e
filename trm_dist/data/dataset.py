"""Data sets as arrays: what a run trains on, with the fingerprint that a resume compares."""

import hashlib
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from trm_dist import __version__
from trm_dist.data import codec, grids, sudoku, sudoku9
from trm_dist.data.cache import Build, Cache, Entry, Sink, cached
from trm_dist.data.disguise import disguise
from trm_dist.data.encoders import worthwhile
from trm_dist.data.meter import Meter
from trm_dist.data.records import RecordFile, batched, identity, opened
from trm_dist.errors import DataError

logger = logging.getLogger(__name__)

Overlong = Literal["truncate", "drop"]
Grids = npt.NDArray[np.uint8]

IGNORED = -100
"""Label of a position that counts nowhere."""

SUDOKU4, SUDOKU9 = "sudoku4:", "sudoku9:"
DEFAULT_TEXT_LENGTH = 256
_PART = 4096
"""Puzzles that are read at a time."""
_PUZZLE_OPTIONS: dict[str, dict[str, int]] = {
    "sudoku4": {}, "sudoku9": {"blanks": sudoku9.NUM_CELLS},
}  # fmt: skip
_SIDES = {"train": (False, 20_000), "test": (True, 1_000)}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples of one length. N samples, L positions."""

    url: str
    inputs: npt.NDArray[np.uint8]
    """Tokens of the question, [N, L]."""
    labels: npt.NDArray[np.uint8]
    """Tokens of the answer, [N, L]."""
    num_tokens: int
    codec: str
    sha256: str
    """Of the content."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts worth telling: truncated, dropped and skipped records."""
    pages: tuple[mmap.mmap, ...] = ()
    """Where the arrays lie, if they are mapped."""
    augment: int = 0
    """Disguises of each sample besides itself."""
    puzzles: npt.NDArray[np.int32] | None = None
    """Which puzzle each sample belongs to, [N]; None: all to the first."""
    num_puzzles: int = 1
    puzzles_sha256: str = ""
    """Of these numbers; empty: there are none."""
    ignored: int | None = None
    """The token of labels that counts nowhere; None: all count."""

    @property
    def num_samples(self) -> int:
        """How many samples there are, disguises included."""
        return len(self.inputs) * (1 + self.augment)

    @property
    def seq_len(self) -> int:
        """Positions of a sample."""
        return int(self.inputs.shape[1])

    def with_augment(self, augment: int) -> Self:
        """Return these samples with so many disguises of each.

        Raises:
            DataError: They are no Sudokus.
        """
        if augment and not self.codec.startswith("sudoku"):
            raise DataError(
                f"--augment {augment}: only Sudokus can be disguised, and {self.url} holds "
                f"{self.codec}. Leave the flag out."
            )
        return replace(self, augment=augment)

    def with_length(self, seq_len: int) -> Self:
        """Check that the samples have a wanted length; 0: any.

        Raises:
            DataError: They have another one.
        """
        if seq_len not in {0, self.seq_len}:
            raise DataError(
                f"--seq-len {seq_len} does not fit {self.url}: a sample has {self.seq_len} "
                "positions. Leave the flag out."
            )
        return self

    def rows(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return inputs and labels of some samples, both int64 [len(samples), L].

        A label is IGNORED where a position does not count.

        The first N are the samples themselves, the next N a disguise of each, and so on.
        """
        places = samples % len(self.inputs)
        rows = self.inputs[places].astype(np.int64), self.labels[places].astype(np.int64)
        is_disguised = samples >= len(self.inputs)
        if is_disguised.any():
            questions, answers = (each[is_disguised] for each in rows)
            hidden = disguise(questions, answers, samples[is_disguised])
            for each, other in zip(rows, hidden, strict=True):
                each[is_disguised] = other
        if self.ignored is not None:
            rows[1][rows[1] == self.ignored] = IGNORED
        for pages in self.pages:
            # They stay in the kernel's cache; this process does not grow with the data.
            pages.madvise(mmap.MADV_DONTNEED)
        return rows

    def puzzles_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which puzzle each of some samples belongs to, int64 [len(samples)]."""
        if self.puzzles is None:
            return np.zeros(len(samples), dtype=np.int64)
        return self.puzzles[samples % len(self.inputs)].astype(np.int64)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the data set."""
        return {
            "url": self.url,
            "sha256": self.sha256,
            "num_samples": self.num_samples,
            "codec": self.codec,
            "num_tokens": self.num_tokens,
            "num_puzzles": self.num_puzzles,
            "puzzles_sha256": self.puzzles_sha256,
        }


def open_dataset(
    url: str,
    *,
    seq_len: int,
    overlong: Overlong = "truncate",
    cache: Cache | None = None,
    augment: int = 0,
) -> Dataset:
    """Open a data set by its URL.

    Args:
        url: `sudoku4:` or `sudoku9:` with `train` or `test`, and `?count=N&seed=N` if wanted; a CSV
            file of 9x9 puzzles; a folder with `dataset.json`; else a file of text records.
        seq_len: Wanted length; 0: what the data need.
        overlong: What happens to text that is longer.
        cache: Where to keep what was encoded; None: nowhere.
        augment: Disguises of each sample besides itself.

    Raises:
        DataError: The data are missing, broken, empty or do not fit.
    """
    found = _preloaded.get((url, overlong))
    if found and seq_len in {0, found.seq_len}:
        return found.with_augment(augment)
    key, build = _recipe(url, seq_len, overlong)
    entry = _cached(cache, key, build) if cache and key else _in_memory(build)
    meta = entry.meta
    dataset = Dataset(
        url=url,
        inputs=entry.inputs,
        labels=entry.labels,
        num_tokens=meta["num_tokens"],
        codec=meta["codec"],
        sha256=meta["sha256"],
        notes=meta["notes"],
        pages=entry.pages,
        puzzles=entry.puzzles,
        num_puzzles=meta.get("num_puzzles", 1),
        puzzles_sha256=meta.get("puzzles_sha256", ""),
        ignored=meta["ignored"],
    )
    return dataset.with_augment(augment).with_length(seq_len)


def _recipe(url: str, seq_len: int, overlong: Overlong) -> tuple[dict[str, Any] | None, Build]:
    """Return what identifies the encoded data, if anything does, and how to encode them."""
    if url.startswith((SUDOKU4, SUDOKU9)):
        return {"url": url}, partial(_build_sudoku, url)
    if os.path.isfile(os.path.join(url, grids.DESCRIPTION)):
        return grids.identity(url), partial(grids.build, url)
    found = identity(url)
    num_bytes = found["size"] if found else None
    if url.rsplit("?", 1)[0].endswith(".csv"):
        return found and {**found, "codec": "sudoku9"}, partial(_build_csv, url, num_bytes)
    length = seq_len or DEFAULT_TEXT_LENGTH
    key = found and {**found, "codec": "bytes", "seq_len": length, "overlong": overlong}
    return key, partial(_build_text, url, length, overlong, num_bytes)


_preloaded: dict[tuple[str, str], Dataset] = {}


def preload(url: str, *, seq_len: int, overlong: Overlong, cache: Cache | None) -> None:
    """Open a data set for the processes that are forked from this one; they share its memory.

    Only local ones: a connection must not be forked. What is wrong with it is for them to say.
    """
    if "://" in url:
        return
    with suppress(DataError):
        _preloaded[url, overlong] = open_dataset(
            url, seq_len=seq_len, overlong=overlong, cache=cache
        )


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
    parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
    numbers: list[npt.NDArray[np.int32]] = []

    class Memory(Sink):
        def __init__(self) -> None:
            """Keep what is written."""

        def write(
            self,
            inputs: npt.NDArray[np.uint8],
            labels: npt.NDArray[np.uint8],
            puzzles: npt.NDArray[np.int32] | None = None,
        ) -> None:
            parts.append((inputs, labels))
            if puzzles is not None:
                numbers.append(puzzles)

    meta = build(Memory())
    inputs, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Entry(inputs, labels, np.concatenate(numbers) if numbers else None, meta, ())


def _build_sudoku(url: str, sink: Sink) -> dict[str, Any]:
    kind, _, rest = url.partition(":")
    side, _, query = rest.partition("?")
    try:
        held_out, count = _SIDES[side]
        wanted = {"count": count, "seed": 0} | _PUZZLE_OPTIONS[kind]
        for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            wanted[name] = dict.fromkeys(wanted, int)[name](value)
        if kind == "sudoku4":
            puzzles = sudoku.draw(wanted["count"], seed=wanted["seed"], held_out=held_out)
            questions, answers = puzzles.questions, puzzles.solutions
        else:
            questions, answers = _draw9(url, held_out=held_out, **wanted)
    except (KeyError, ValueError) as error:
        options = "".join(f"&{each}=N" for each in _PUZZLE_OPTIONS[kind])
        raise DataError(
            f"--dataset {url}: this is not a set of puzzles ({error}). Write {kind}:train or "
            f"{kind}:test, and if wanted ?count=N&seed=N{options} with a count up to "
            f"{sudoku.MAX_PUZZLES}."
        ) from error
    sink.write(questions, answers)
    content = hashlib.sha256(questions.tobytes() + answers.tobytes())
    num_tokens = sudoku.NUM_TOKENS if kind == "sudoku4" else sudoku9.NUM_TOKENS
    return {
        "url": url,
        "num_tokens": num_tokens,
        "codec": kind,
        "ignored": None,
        "sha256": content.hexdigest(),
        "notes": {},
    }


def _draw9(url: str, *, count: int, seed: int, blanks: int, held_out: bool) -> tuple[Grids, Grids]:
    if not 0 < count <= sudoku9.MAX_PUZZLES:
        raise ValueError(f"between 1 and {sudoku9.MAX_PUZZLES} puzzles can be drawn, not {count}")
    if not 0 < blanks <= sudoku9.NUM_CELLS:
        raise ValueError(f"a puzzle has 1 to {sudoku9.NUM_CELLS} blanks, not {blanks}")
    puzzles = []
    with Meter(url, count, "puzzles") as tell:
        for number in range(count):
            puzzles.append(sudoku9.draw(number, seed=seed, held_out=held_out, blanks=blanks))
            tell(number + 1)
    questions, answers = zip(*puzzles, strict=True)
    return sudoku9.tokens(questions), sudoku9.tokens(answers)


def _build_csv(url: str, num_bytes: int | None, sink: Sink) -> dict[str, Any]:
    content = hashlib.sha256()
    with opened(url) as file, Meter(url, num_bytes, "bytes") as tell:
        lines = (line.decode("utf-8", "replace") for line in _hashed(file, content, tell))
        num_rows = 0
        for part in batched(sudoku9.read_csv(url, lines), _PART):
            num_rows += len(part)
            questions, answers = zip(*part, strict=True)
            sink.write(sudoku9.tokens(questions), sudoku9.tokens(answers))
    if not num_rows:
        raise DataError(f"{url} holds no puzzles. Give a file with at least one.")
    return {
        "url": url,
        "num_tokens": sudoku9.NUM_TOKENS,
        "codec": "sudoku9",
        "ignored": None,
        "sha256": content.hexdigest(),
        "notes": {},
    }


def _hashed(lines: Iterable[bytes], content: Any, tell: Meter) -> Iterator[bytes]:
    num_bytes = 0
    for line in lines:
        content.update(line)
        num_bytes += len(line)
        tell(num_bytes)
        yield line


def _build_text(
    url: str, seq_len: int, overlong: Overlong, num_bytes: int | None, sink: Sink
) -> dict[str, Any]:
    num_cut = num_kept = 0
    with ExitStack() as stack:
        file = RecordFile(url, stack.enter_context(Meter(url, num_bytes, "bytes")))
        parts = file.encoded(seq_len, worthwhile(num_bytes))
        for encoded in stack.enter_context(closing(parts)):
            num_cut += int(encoded.is_cut.sum())
            inputs, labels = encoded.inputs, encoded.labels
            if overlong == "drop":
                inputs, labels = inputs[~encoded.is_cut], labels[~encoded.is_cut]
            num_kept += len(inputs)
            if len(inputs):
                sink.write(inputs, labels)
    if not num_kept:
        raise DataError(
            f"{url}: all {num_cut} records are longer than --seq-len {seq_len}, and "
            "--overlong drop leaves none. Raise --seq-len, or use --overlong truncate."
        )
    return {
        "url": url,
        "num_tokens": codec.NUM_TOKENS,
        "codec": "bytes",
        "ignored": codec.PAD,
        "sha256": file.sha256,
        "notes": {
            "truncated": num_cut if overlong == "truncate" else 0,
            "dropped": num_cut if overlong == "drop" else 0,
            "skipped": file.num_skipped,
        },
    }
