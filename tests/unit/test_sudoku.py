"""4x4 puzzles, judged by a solver and by symmetries that share no code with the generator."""

import random
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
import pytest

from trm_dist.data.sudoku import BLANK, MAX_PUZZLES, NUM_CELLS, NUM_TOKENS, Puzzles, classes, draw

Grid = tuple[int, ...]
Numbers = npt.NDArray[np.int64]


def is_free(grid: list[int], cell: int, digit: int) -> bool:
    row, column = divmod(cell, 4)
    return all(
        grid[other] != digit
        for other in range(16)
        if other // 4 == row
        or other % 4 == column
        or (other // 8, other % 4 // 2) == (row // 2, column // 2)
    )


def solutions_of(grid: list[int]) -> Iterator[Grid]:
    """Try every digit 1-4 in every empty cell (0), one after the other."""
    if 0 not in grid:
        yield tuple(grid)
        return
    cell = grid.index(0)
    for digit in (1, 2, 3, 4):
        if is_free(grid, cell, digit):
            yield from solutions_of([*grid[:cell], digit, *grid[cell + 1 :]])


@cache
def solved_grids() -> list[Grid]:
    return sorted(solutions_of([0] * 16))


@cache
def drawn(held_out: bool) -> Puzzles:
    return draw(2000, seed=0, held_out=held_out)


def digits(tokens: npt.NDArray[np.uint8]) -> list[int]:
    """Digits 1-4 and 0 for blank, from tokens."""
    return (tokens.astype(int) - BLANK).tolist()


def rearrangements() -> Numbers:
    """All 128 ways to move cells that keep rows, columns and boxes, each as 16 cell numbers."""
    lines = [
        order
        for order in permutations(range(4))
        if {order[0] // 2, order[1] // 2} in ({0}, {1})  # bands stay together
    ]
    moves = [[row * 4 + column for row in rows for column in columns]
             for rows, columns in product(lines, lines)]  # fmt: skip
    transposed = [[cells[at % 4 * 4 + at // 4] for at in range(16)] for cells in moves]
    return np.array(moves + transposed)


def canonical(questions: npt.NDArray[np.uint8]) -> set[int]:
    """The least form of each puzzle over all cell moves, digits renamed as they appear."""
    codes = []
    for cells in rearrangements():
        moved = questions[:, cells].astype(np.int64)
        first_at = np.array([
            np.where((moved == token).any(1), (moved == token).argmax(1), 16 + token)
            for token in range(BLANK + 1, NUM_TOKENS)
        ])  # fmt: skip
        rank = 1 + first_at.argsort(0).argsort(0)
        named = np.where(moved == BLANK, 0, np.take_along_axis(rank.T, moved.clip(2) - 2, 1))
        codes.append((named * 5 ** np.arange(16)).sum(1))
    return set(np.min(codes, axis=0).tolist())


def disguise(question: Grid, solution: Grid, chance: random.Random) -> tuple[Grid, Grid]:
    """Apply random symmetries one by one: rename digits, transpose, swap bands, stacks, lines."""
    names = [0, *chance.sample((1, 2, 3, 4), 4)]
    grids = np.array([question, solution]).reshape(2, 4, 4)
    grids = np.array(names)[grids]
    for _ in range(12):
        kind = chance.randrange(4)
        if kind == 0:
            grids = grids.transpose(0, 2, 1)
        elif kind == 1:
            grids = grids[:, [2, 3, 0, 1]]
        else:
            grids = grids[:, [1, 0, 2, 3] if kind == 2 else [0, 1, 3, 2]]
    return tuple(grids[0].ravel().tolist()), tuple(grids[1].ravel().tolist())


def numbered(pairs: list[tuple[Grid, Grid]]) -> tuple[Numbers, Numbers]:
    """Number of each solution among all grids in their order, and the mask of its clues."""
    grid_ids = [solved_grids().index(solution) for _, solution in pairs]
    masks = [sum(1 << cell for cell in range(16) if question[cell]) for question, _ in pairs]
    return np.array(grid_ids), np.array(masks)


def pairs_of(puzzles: Puzzles, count: int) -> list[tuple[Grid, Grid]]:
    return [
        (tuple(digits(question)), tuple(digits(solution)))
        for question, solution in zip(
            puzzles.questions[:count], puzzles.solutions[:count], strict=True
        )
    ]


def test_solutions_are_the_288_grids() -> None:
    found = {solution for _, solution in pairs_of(drawn(False), 2000)}

    assert len(solved_grids()) == 288
    assert found == set(solved_grids())


@pytest.mark.parametrize("held_out", [False, True])
def test_puzzle_has_only_its_own_solution(held_out: bool) -> None:
    for question, solution in pairs_of(drawn(held_out), 40):
        assert list(solutions_of(list(question))) == [solution]


@pytest.mark.parametrize("held_out", [False, True])
def test_puzzle_has_10_or_11_blanks(held_out: bool) -> None:
    blanks = (drawn(held_out).questions == BLANK).sum(1)

    assert set(blanks.tolist()) == {10, 11}


@pytest.mark.parametrize("held_out", [False, True])
def test_puzzles_are_distinct(held_out: bool) -> None:
    questions = drawn(held_out).questions

    assert len({question.tobytes() for question in questions}) == 2000


def test_puzzles_are_arrays_of_tokens() -> None:
    puzzles = drawn(False)

    assert puzzles.questions.shape == puzzles.solutions.shape == (2000, NUM_CELLS)
    assert puzzles.questions.dtype == puzzles.solutions.dtype == np.uint8
    assert set(np.unique(puzzles.questions).tolist()) == {1, 2, 3, 4, 5}
    assert set(np.unique(puzzles.solutions).tolist()) == {2, 3, 4, 5}


def test_clues_agree_with_solution() -> None:
    puzzles = drawn(True)

    is_clue = puzzles.questions != BLANK
    assert np.array_equal(puzzles.questions[is_clue], puzzles.solutions[is_clue])


@pytest.mark.parametrize(
    ("held_out", "digest"),
    [
        (False, "062f914c72a97082c98042825d2aac7c2807c4e0ae6a76b2a124860216855a71"),
        (True, "8201d08ec4b3ef5b9af5fcc889992384c8fd909839e3bd42892933f9cefbabb8"),
    ],
)
def test_puzzles_are_golden(held_out: bool, digest: str) -> None:
    puzzles = draw(100, seed=0, held_out=held_out)

    content = puzzles.questions.tobytes() + puzzles.solutions.tobytes()
    assert sha256(content).hexdigest() == digest


def test_same_seed_draws_same_puzzles() -> None:
    again = draw(30, seed=0, held_out=True)

    assert np.array_equal(again.questions, drawn(True).questions[:30])
    assert np.array_equal(again.solutions, drawn(True).solutions[:30])


def test_other_seed_draws_other_puzzles() -> None:
    other = draw(100, seed=1, held_out=True).questions

    ours = {question.tobytes() for question in drawn(True).questions[:100]}
    assert len(ours & {question.tobytes() for question in other}) < 10


@pytest.mark.parametrize("held_out", [False, True])
def test_disguised_puzzle_keeps_its_class(held_out: bool) -> None:
    chance = random.Random(5)
    pairs = pairs_of(drawn(held_out), 60)

    disguised = [disguise(*pair, chance) for pair in pairs for _ in range(5)]

    assert len(set(disguised)) > 250
    expected = classes(*numbered(pairs)).repeat(5)
    assert np.array_equal(classes(*numbered(disguised)), expected)


def test_no_held_out_puzzle_is_a_disguised_training_puzzle() -> None:
    training, held_out = (canonical(drawn(side).questions) for side in (False, True))

    assert len(training) > 400  # so many classes that a leak could not hide
    assert len(held_out) > 40
    assert training.isdisjoint(held_out)


def test_held_out_side_is_a_tenth_of_all_classes() -> None:
    training, held_out = (canonical(drawn(side).questions) for side in (False, True))

    assert 0.05 < len(held_out) / len(training | held_out) < 0.15


@pytest.mark.parametrize("count", [0, -1, MAX_PUZZLES + 1])
def test_count_out_of_range_raises(count: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {MAX_PUZZLES} puzzles"):
        draw(count, seed=0, held_out=False)
