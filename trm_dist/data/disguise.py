"""Disguises of Sudokus: the symmetries that turn a puzzle into an equal one, drawn by a counter.

Digits are relabelled; the grid is transposed or not; bands and rows in a band, stacks and columns
in a stack change places. Which ones a sample gets is a pure function of its number.
"""

import math

import numpy as np
import numpy.typing as npt

from trm_dist.randomness import derive_key, random_words

_BLANK = 1
_WORDS = 64
"""Random words of a sample, of which 34 are used at most."""

Tokens = npt.NDArray[np.int64]


def disguise(questions: Tokens, answers: Tokens, samples: Tokens) -> tuple[Tokens, Tokens]:
    """Return puzzles and their solutions in the disguises of these samples.

    Args:
        questions: [N, side * side]; 1 is blank, from 2 on the digits.
        answers: The same.
        samples: Numbers that choose the disguises, [N].
    """
    side = math.isqrt(questions.shape[1])
    counters = samples[:, None] * _WORDS + np.arange(_WORDS)
    words = random_words(derive_key("disguise"), counters)
    names = _names(words[:, :side])
    cells = _cells(words[:, side:], side)

    def moved(grids: Tokens) -> Tokens:
        return np.take_along_axis(names, np.take_along_axis(grids, cells, 1), 1)

    return moved(questions), moved(answers)


def _names(words: npt.NDArray[np.uint64]) -> Tokens:
    """Return what each token becomes, [N, side + 2]."""
    digits = np.argsort(words, axis=1) + _BLANK + 1
    kept = np.tile(np.arange(_BLANK + 1), (len(words), 1))
    return np.concatenate([kept, digits], axis=1)


def _cells(words: npt.NDArray[np.uint64], side: int) -> Tokens:
    """Return from which cell each cell comes, [N, side * side]."""
    half = side + math.isqrt(side)
    rows, columns = _lines(words[:, :half], side), _lines(words[:, half : 2 * half], side)
    cells = rows[:, :, None] * side + columns[:, None, :]
    is_transposed = (words[:, 2 * half] & np.uint64(1)).astype(bool)
    cells = np.where(is_transposed[:, None, None], cells.transpose(0, 2, 1), cells)
    return cells.reshape(len(words), side * side)


def _lines(words: npt.NDArray[np.uint64], side: int) -> Tokens:
    """Return an order of rows or columns that keeps bands together, [N, side]."""
    box = math.isqrt(side)
    bands = np.argsort(words[:, :box], axis=1)
    inside = np.argsort(words[:, box:].reshape(-1, box, box), axis=2)
    moved = np.take_along_axis(inside, bands[:, :, None], 1)
    return (bands[:, :, None] * box + moved).reshape(-1, side)
