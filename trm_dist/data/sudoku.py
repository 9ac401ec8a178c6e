"""Puzzles of 4x4 Sudoku with one solution, drawn from a seed.

There are 288 solved grids. A puzzle is (grid, clue mask); it has one solution exactly when no other
grid agrees with it on every clue, which is one comparison of bit masks, so no solver is needed.

The symmetries of Sudoku (relabelling of digits, transposition, exchange of bands, of rows in a
band, of stacks, of columns in a stack: 24 * 128) turn a puzzle into an equal one. The training and
the held-out set divide the *classes* of puzzles under all of them, so no held-out puzzle is a
disguised training puzzle, whatever augmentation is used.

Tokens: 0 pad, 1 blank, 2-5 the digits 1-4, as the 9x9 sets of the paper number theirs.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
import numpy.typing as npt

from trm_dist.randomness import derive_key, random_uniform, random_words

NUM_CELLS = 16
NUM_TOKENS = 6
BLANK = 1
NUM_CLUES = (5, 6)
"""Clues of a puzzle: 10 or 11 of 16 cells are blank."""

MAX_PUZZLES = 100_000
"""Most puzzles that can be drawn of one side; about 1,190,000 and 135,000 exist."""

_HELD_OUT_SHARE = 0.1
_NUM_GRIDS = 288
_NUM_MASKS = 1 << NUM_CELLS
_TRIES_AT_ONCE = 1 << 16
_MAX_TRIES = 1 << 28

Grids = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Puzzles:
    """Puzzles and their solutions, both uint8 [N, 16], as tokens."""

    questions: Grids
    solutions: Grids


def draw(count: int, *, seed: int, held_out: bool) -> Puzzles:
    """Draw `count` distinct puzzles of one side; the same ones for the same seed.

    Raises:
        ValueError: `count` is not in [1, MAX_PUZZLES].
    """
    if not 0 < count <= MAX_PUZZLES:
        raise ValueError(f"between 1 and {MAX_PUZZLES} puzzles can be drawn, not {count}")
    key = derive_key("sudoku4", seed, int(held_out))
    puzzles = np.empty(0, dtype=np.int64)
    for start in range(0, _MAX_TRIES, _TRIES_AT_ONCE):
        tries = _candidates(key, np.arange(start, start + _TRIES_AT_ONCE), held_out=held_out)
        puzzles = _without_repeats(np.concatenate([puzzles, tries]))
        if len(puzzles) >= count:
            break
    grid_ids, masks = np.divmod(puzzles[:count], _NUM_MASKS)
    solutions = _grids()[grid_ids] + np.uint8(BLANK)
    is_clue = (masks[:, None] >> np.arange(NUM_CELLS)) & 1
    return Puzzles(np.where(is_clue, solutions, np.uint8(BLANK)), solutions)


def classes(grid_ids: Numbers, masks: Numbers) -> Numbers:
    """Return the number of each puzzle's class under all symmetries.

    Relabelling acts on the grid alone, so a grid counts by its *shape* (the grid with its first row
    renamed to 1234); the class is the least (shape, mask) over the 128 rearrangements of cells.
    """
    shapes, low_moved, high_moved = _symmetry_tables()
    low, high = masks & 0xFF, masks >> 8
    best = np.full(len(masks), np.iinfo(np.int64).max)
    for shape, low_table, high_table in zip(shapes, low_moved, high_moved, strict=True):
        moved = low_table[low] | high_table[high]
        np.minimum(best, shape[grid_ids] * _NUM_MASKS + moved, out=best)
    return best


def _candidates(key: int, counters: Numbers, *, held_out: bool) -> Numbers:
    """Return the (grid, mask) numbers, among one random pair a counter, that are wanted puzzles."""
    words = random_words(key, counters)
    grid_ids = (words % np.uint64(_NUM_GRIDS)).astype(np.int64)
    choices = _clue_masks()
    masks = choices[(words // np.uint64(_NUM_GRIDS) % np.uint64(len(choices))).astype(np.int64)]
    agrees = (_agreement()[grid_ids] & masks[:, None]) == masks[:, None]
    has_one_solution = agrees.sum(axis=1) == 1
    share = random_uniform(derive_key("sudoku4-side"), classes(grid_ids, masks))
    is_wanted = has_one_solution & ((share < _HELD_OUT_SHARE) == held_out)
    wanted: Numbers = grid_ids[is_wanted] * _NUM_MASKS + masks[is_wanted]
    return wanted


def _without_repeats(numbers: Numbers) -> Numbers:
    _, first = np.unique(numbers, return_index=True)
    return numbers[np.sort(first)]


@cache
def _grids() -> Grids:
    """Return all 288 solved grids, digits 1-4, uint8 [288, 16]."""
    rows = list(permutations((1, 2, 3, 4)))
    bands = [
        (a, b) for a, b in product(rows, repeat=2) if not {*a[:2]} & {*b[:2]} | {*a[2:]} & {*b[2:]}
    ]
    grids = [[*top, *bottom] for top, bottom in product(bands, repeat=2)]
    is_solved = [all(len({*column}) == 4 for column in zip(*grid, strict=True)) for grid in grids]
    return np.array(grids, dtype=np.uint8)[is_solved].reshape(-1, NUM_CELLS)


@cache
def _clue_masks() -> Numbers:
    """Return every mask of 5 or 6 clues; bit c is set when cell c is given."""
    masks = np.arange(_NUM_MASKS)
    return masks[np.isin(np.bitwise_count(masks), NUM_CLUES)]


@cache
def _agreement() -> Numbers:
    """Return for each two grids the mask of cells in which they agree, [288, 288]."""
    grids = _grids()
    agrees = (grids[:, None] == grids[None]).astype(np.int64)
    masks: Numbers = (agrees << np.arange(NUM_CELLS)).sum(-1)
    return masks


@cache
def _symmetry_tables() -> tuple[Numbers, Numbers, Numbers]:
    """Return what each of the 128 rearrangements of cells does to grids and to masks.

    Returns:
        The shape each grid gets, [128, 288]; where the low and the high byte of a mask go,
        both [128, 256].
    """
    cells = np.arange(NUM_CELLS).reshape(4, 4)
    lines = [a + b for a, b in product([(0, 1), (1, 0)], [(2, 3), (3, 2)])]
    lines += [line[2:] + line[:2] for line in lines]
    moved = [cells[np.ix_(rows, columns)] for rows, columns in product(lines, lines)]
    symmetries = [grid.reshape(-1) for each in moved for grid in (each, each.T)]
    grids = _grids()
    numbers = {_relabelled(grid): number for number, grid in enumerate(grids)}
    shapes = [[numbers[_relabelled(grid[symmetry])] for grid in grids] for symmetry in symmetries]
    targets = np.argsort(symmetries, axis=1)
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    low, high = (
        (bits << targets[:, None, half]).sum(-1) for half in (slice(0, 8), slice(8, NUM_CELLS))
    )
    return np.array(shapes), low, high


def _relabelled(grid: Grids) -> bytes:
    names = np.zeros(5, dtype=np.uint8)
    names[grid[:4]] = (1, 2, 3, 4)
    return names[grid].tobytes()
