"""Grids in the folders that TRM's public code writes: mazes, ARC, Sudoku.

A folder holds `dataset.json` with the sizes, `all__inputs.npy` and `all__labels.npy`, [N, L]. A
label that is `ignore_label_id` counts nowhere. Each row is a sample. Rows `all__puzzle_indices[i]`
up to the next one belong to the puzzle `all__puzzle_identifiers[i]`, one of
`num_puzzle_identifiers`; without these files all rows belong to one puzzle.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trm_dist.data.cache import Sink
from trm_dist.errors import DataError

DESCRIPTION = "dataset.json"

_INPUTS, _LABELS = "all__inputs.npy", "all__labels.npy"
_PUZZLE_FILES = _IDENTIFIERS, _INDICES = "all__puzzle_identifiers.npy", "all__puzzle_indices.npy"
_PART = 4096


def identity(folder: str) -> dict[str, Any]:
    """Return what tells the content of a folder from another one.

    Raises:
        DataError: A file is missing.
    """
    found: dict[str, Any] = {"url": os.path.abspath(folder), "codec": "grid"}
    more = _PUZZLE_FILES if _has_puzzles(folder) else ()
    for name in (DESCRIPTION, _INPUTS, _LABELS, *more):
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError as error:
            raise DataError(
                f"--dataset {folder}: there is {DESCRIPTION}, but {name} cannot be read ({error}). "
                "Give a whole folder."
            ) from error
        found[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return found


def build(folder: str, sink: Sink) -> dict[str, Any]:
    """Read a folder, part after part.

    Raises:
        DataError: The files do not fit each other.
    """
    sizes = _read_sizes(folder)
    inputs, labels = _load(folder, _INPUTS), _load(folder, _LABELS)
    _check(folder, sizes, inputs, labels)
    puzzles = _read_puzzles(folder, sizes, len(inputs)) if _has_puzzles(folder) else None
    content, of_puzzles = hashlib.sha256(), hashlib.sha256()
    for start in range(0, len(inputs), _PART):
        questions, answers = (np.asarray(each[start : start + _PART]) for each in (inputs, labels))
        if max(questions.max(), answers.max()) >= sizes["vocab_size"]:
            raise DataError(
                f"--dataset {folder}: a token is not below vocab_size {sizes['vocab_size']} of "
                f"{DESCRIPTION}. Mend one of them."
            )
        questions, answers = questions.astype(np.uint8), answers.astype(np.uint8)
        # Labels as int16: a checkpoint compares what was hashed before they were kept as bytes.
        content.update(questions.tobytes() + answers.astype(np.int16).tobytes())
        numbers = puzzles.of_rows(start, len(questions)) if puzzles else None
        sink.write(questions, answers, numbers)
        of_puzzles.update(b"" if numbers is None else numbers.tobytes())
    found = {
        "url": folder,
        "num_tokens": sizes["vocab_size"],
        "codec": "grid",
        "ignored": sizes["ignore_label_id"],
        "sha256": content.hexdigest(),
        "notes": {},
    }
    if puzzles:
        found |= {"num_puzzles": puzzles.count, "puzzles_sha256": of_puzzles.hexdigest()}
    return found


@dataclass(frozen=True, slots=True)
class _Puzzles:
    """Which rows belong to which puzzle."""

    identifiers: npt.NDArray[np.int32]
    """Of each run of rows."""
    ends: npt.NDArray[np.int64]
    """Where each run ends."""
    count: int
    """How many puzzles there are, also in other folders of this data set."""

    def of_rows(self, start: int, num_rows: int) -> npt.NDArray[np.int32]:
        rows = np.arange(start, start + num_rows)
        return self.identifiers[np.searchsorted(self.ends, rows, side="right")]


def _has_puzzles(folder: str) -> bool:
    return all(os.path.exists(os.path.join(folder, each)) for each in _PUZZLE_FILES)


def _read_puzzles(folder: str, sizes: dict[str, Any], num_rows: int) -> _Puzzles:
    identifiers, indices = _load(folder, _IDENTIFIERS), _load(folder, _INDICES)
    if (
        identifiers.ndim != 1
        or indices.shape != (len(identifiers) + 1,)
        or (indices[0], indices[-1]) != (0, num_rows)
        or (np.diff(indices.astype(np.int64)) < 0).any()
    ):
        raise DataError(
            f"--dataset {folder}: {_INDICES} {indices.shape} does not cut the {num_rows} rows into "
            f"the puzzles of {_IDENTIFIERS} {identifiers.shape}. Mend one of them."
        )
    if not 0 <= identifiers.min() <= identifiers.max() < sizes["num_puzzles"]:
        raise DataError(
            f"--dataset {folder}: {_IDENTIFIERS} has numbers outside 0 to num_puzzle_identifiers "
            f"({sizes['num_puzzles']}) of {DESCRIPTION}. Mend one of them."
        )
    ends = indices[1:].astype(np.int64)
    return _Puzzles(identifiers.astype(np.int32), ends, sizes["num_puzzles"])


def _read_sizes(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, DESCRIPTION), encoding="utf-8") as file:
            content = json.load(file)
        sizes = {name: int(content[name]) for name in ("vocab_size", "seq_len")}
        ignored = content.get("ignore_label_id")
        return sizes | {
            "ignore_label_id": None if ignored is None else int(ignored),
            "num_puzzles": int(content.get("num_puzzle_identifiers", 1)),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--dataset {folder}: {DESCRIPTION} does not say vocab_size and seq_len in numbers "
            f"({error!r})."
        ) from error


def _load(folder: str, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(np.load(os.path.join(folder, name), mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"--dataset {folder}: {name} cannot be read ({error}).") from error


def _check(
    folder: str, sizes: dict[str, Any], inputs: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> None:
    shape = (len(inputs), sizes["seq_len"])
    if inputs.shape != shape or labels.shape != shape or not len(inputs):
        raise DataError(
            f"--dataset {folder}: inputs {inputs.shape} and labels {labels.shape} are not both "
            f"[N, {sizes['seq_len']}], as {DESCRIPTION} says. Mend one of them."
        )
    if not 0 < sizes["vocab_size"] <= 256 or min(inputs.min(), labels.min()) < 0:
        raise DataError(
            f"--dataset {folder}: tokens must be from 0 up to vocab_size, which is at most 256."
        )
