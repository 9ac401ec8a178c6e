"""Data sets as arrays: what a run trains on, with the fingerprint that a resume compares."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from trm_dist.data import codec, sudoku
from trm_dist.data.records import read_records
from trm_dist.errors import DataError

SUDOKU_SCHEME = "sudoku4:"
DEFAULT_TEXT_LENGTH = 256
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
        return self.inputs[samples].astype(np.int64), self.labels[samples].astype(np.int64)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the data set."""
        return {
            "url": self.url,
            "sha256": self.sha256,
            "num_samples": self.num_samples,
            "codec": self.codec,
            "num_tokens": self.num_tokens,
        }


def open_dataset(url: str, *, seq_len: int, overlong: Literal["truncate", "drop"]) -> Dataset:
    """Open a data set by its URL.

    Args:
        url: `sudoku4:train` or `sudoku4:test`, with `?count=N&seed=N` if wanted; else a file of
            text records.
        seq_len: Wanted length; 0: what the data need.
        overlong: What happens to text that is longer.

    Raises:
        DataError: The data are missing, broken, empty or do not fit.
    """
    if url.startswith(SUDOKU_SCHEME):
        return _open_sudoku(url, seq_len)
    return _open_text(url, seq_len or DEFAULT_TEXT_LENGTH, overlong)


def _open_sudoku(url: str, seq_len: int) -> Dataset:
    if seq_len not in {0, sudoku.NUM_CELLS}:
        raise DataError(
            f"--seq-len {seq_len} does not fit {url}: a 4x4 puzzle has {sudoku.NUM_CELLS} cells. "
            "Leave the flag out."
        )
    side, _, query = url.removeprefix(SUDOKU_SCHEME).partition("?")
    try:
        held_out, count = _SIDES[side]
        wanted = {"count": count, "seed": 0}
        for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            wanted[name] = {"count": int, "seed": int}[name](value)
        puzzles = sudoku.draw(wanted["count"], seed=wanted["seed"], held_out=held_out)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"--dataset {url}: this is not a set of puzzles ({error}). Write sudoku4:train or "
            f"sudoku4:test, and if wanted ?count=N&seed=N with N up to {sudoku.MAX_PUZZLES}."
        ) from error
    content = hashlib.sha256(puzzles.questions.tobytes() + puzzles.solutions.tobytes())
    return Dataset(
        url=url,
        inputs=puzzles.questions,
        labels=puzzles.solutions.astype(np.int16),
        num_tokens=sudoku.NUM_TOKENS,
        codec="sudoku4",
        sha256=content.hexdigest(),
    )


def _open_text(url: str, seq_len: int, overlong: Literal["truncate", "drop"]) -> Dataset:
    file = read_records(url)
    encoded = [
        codec.encode(record.context, record.query, record.completion, seq_len)
        for record in file.records
    ]
    num_cut = sum(each.is_cut for each in encoded)
    if overlong == "drop":
        encoded = [each for each in encoded if not each.is_cut]
        if not encoded:
            raise DataError(
                f"{url}: all {num_cut} records are longer than --seq-len {seq_len}, and "
                "--overlong drop leaves none. Raise --seq-len, or use --overlong truncate."
            )
    return Dataset(
        url=url,
        inputs=np.stack([each.inputs for each in encoded]),
        labels=np.stack([each.labels for each in encoded]),
        num_tokens=codec.NUM_TOKENS,
        codec="bytes",
        sha256=file.sha256,
        notes={
            "truncated": num_cut if overlong == "truncate" else 0,
            "dropped": num_cut if overlong == "drop" else 0,
            "skipped": file.num_skipped,
        },
    )
