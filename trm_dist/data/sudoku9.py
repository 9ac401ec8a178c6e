"""9x9 Sudoku: puzzles with one solution from a seed, from CSV files, and their disguises.

A generated puzzle is minimal: no clue of it can be left out, unless fewer blanks were asked for.
Its grid is filled at random, then one clue after the other is taken away in a random order as long
as the solution stays the only one, which a solver checks. The sides of the generator draw from
different keys; that a held-out puzzle equals a training puzzle under a symmetry is possible and
never seen: there are about 10^30 classes.

Tokens: 0 pad, 1 blank, 2-10 the digits 1-9, as TRM's public code numbers them.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from trm_dist.errors import DataError
from trm_dist.randomness import derive_key, random_words

SIDE, NUM_CELLS, NUM_TOKENS = 9, 81, 11
BLANK = 1
MAX_PUZZLES = 100_000

Cells = Sequence[int]
"""81 digits, 0 where blank."""

_ALL = 0b1111111110
_UNITS = [
    (row, SIDE + column, 2 * SIDE + row // 3 * 3 + column // 3)
    for row in range(SIDE)
    for column in range(SIDE)
]
"""The row, the column and the box of each cell."""
_NAMES = {"question": "question", "puzzle": "question", "answer": "answer", "solution": "answer"}


def draw(
    number: int, *, seed: int, held_out: bool, blanks: int = NUM_CELLS
) -> tuple[list[int], list[int]]:
    """Return a puzzle of a side and its solution, the same for the same arguments.

    Args:
        number: Of the puzzle.
        seed: Of all puzzles.
        held_out: Which side.
        blanks: Blank cells after which no further clue is taken away.
    """
    key = derive_key("sudoku9", seed, int(held_out), number)
    (solution,) = solve([0] * NUM_CELLS, limit=1, ranks=random_words(key, np.arange(810)))
    question = list(solution)
    for cell in np.argsort(random_words(key, np.arange(810, 891))).tolist():
        if question.count(0) == blanks:
            break
        digit, question[cell] = question[cell], 0
        if len(solve(question, limit=2)) > 1:
            question[cell] = digit
    return question, solution


def solve(
    cells: Cells, *, limit: int, ranks: npt.NDArray[np.uint64] | None = None
) -> list[list[int]]:
    """Return up to `limit` solutions.

    Args:
        cells: The puzzle; digits that contradict each other have no solution.
        limit: After how many to stop.
        ranks: [810] Which digit of a cell to try first; in their order without.
    """
    board = _Board(ranks)
    for cell, digit in enumerate(cells):
        if digit:
            if not board.choices(cell) >> digit & 1:
                return []
            board.put(cell, digit)
    board.fill([cell for cell, digit in enumerate(cells) if not digit], limit)
    return board.found


class _Board:
    """A grid, and the digits that each row, column and box has, as bits."""

    def __init__(self, ranks: npt.NDArray[np.uint64] | None) -> None:
        self._grid = [0] * NUM_CELLS
        self._taken = [0] * (3 * SIDE)
        self._ranks = ranks
        self.found: list[list[int]] = []

    def choices(self, cell: int) -> int:
        """Return the digits that a cell may have, as bits."""
        row, column, box = _UNITS[cell]
        return _ALL & ~(self._taken[row] | self._taken[column] | self._taken[box])

    def put(self, cell: int, digit: int) -> None:
        """Write a digit, or take it away again."""
        self._grid[cell] = digit if not self._grid[cell] else 0
        for unit in _UNITS[cell]:
            self._taken[unit] ^= 1 << digit

    def fill(self, blanks: list[int], limit: int) -> None:
        """Find solutions: try the cell with the fewest choices, then the rest."""
        if not blanks:
            self.found.append(self._grid.copy())
            return
        place, choices = self._narrowest(blanks)
        cell, rest = blanks[place], blanks[:place] + blanks[place + 1 :]
        digits = [digit for digit in range(1, SIDE + 1) if choices >> digit & 1]
        if self._ranks is not None:
            ranks = self._ranks
            digits.sort(key=lambda digit: int(ranks[cell * 10 + digit]))
        for digit in digits:
            self.put(cell, digit)
            self.fill(rest, limit)
            self.put(cell, digit)
            if len(self.found) >= limit:
                return

    def _narrowest(self, blanks: list[int]) -> tuple[int, int]:
        best, fewest, found = 0, SIDE + 1, 0
        for place, cell in enumerate(blanks):
            choices = self.choices(cell)
            count = choices.bit_count()
            if count < fewest:
                best, fewest, found = place, count, choices
                if count <= 1:
                    break
        return best, found


def read_csv(url: str, lines: Iterable[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Read puzzles and solutions: two columns, or a header that names them.

    Known headers: question and answer (as in Sudoku-Extreme, with source and rating beside them),
    puzzle and solution. Blanks are 0 or a dot.

    Raises:
        DataError: A row is no puzzle with its solution; the message names the line.
    """
    columns: dict[str, int] = {}
    for number, row in enumerate(csv.reader(lines), 1):
        if not row:
            continue
        if not columns:
            columns = {_NAMES[name]: at for at, name in enumerate(row) if name in _NAMES}
            if columns.keys() == {"question", "answer"}:
                continue
            columns = {"question": 0, "answer": 1}
        try:
            question, answer = (_digits(row[columns[name]]) for name in ("question", "answer"))
            _check(question, answer)
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{url}, line {number}: this is not a 9x9 puzzle and its solution ({error}). A row "
                "has 81 digits of each, 0 or . for a blank; a header may name question,answer or "
                "puzzle,solution."
            ) from error
        yield question, answer


def tokens(cells: Iterable[Cells]) -> npt.NDArray[np.uint8]:
    """Return puzzles or solutions as tokens, [N, 81]."""
    return np.array(list(cells), dtype=np.uint8) + np.uint8(BLANK)


def _digits(text: str) -> list[int]:
    digits = [0 if each == "." else int(each) for each in text.strip()]
    if len(digits) != NUM_CELLS:
        raise ValueError(f"{len(digits)} cells")
    return digits


def _check(question: Cells, answer: Cells) -> None:
    if any(given not in {0, solved} for given, solved in zip(question, answer, strict=True)):
        raise ValueError("a clue differs from the solution")
    if 0 in answer or not solve(answer, limit=1):
        raise ValueError("the solution breaks the rules")
