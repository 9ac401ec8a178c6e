"""9x9 Sudoku: the generator, the solver, CSV files and disguises."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from trm_dist.data import sudoku9
from trm_dist.data.cache import Cache
from trm_dist.data.dataset import open_dataset
from trm_dist.data.disguise import disguise
from trm_dist.errors import DataError

WORLDS_HARDEST = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."


def is_solved(grid: np.ndarray) -> bool:
    """Check the rules with nothing of the code under test."""
    square = np.asarray(grid).reshape(9, 9)
    units = [*square, *square.T]
    units += [square[r : r + 3, c : c + 3].ravel() for r in (0, 3, 6) for c in (0, 3, 6)]
    return all(sorted(unit.tolist()) == list(range(1, 10)) for unit in units)


def test_puzzle_has_one_solution_and_no_clue_too_many() -> None:
    for number in range(3):
        question, answer = sudoku9.draw(number, seed=5, held_out=False)
        assert is_solved(np.array(answer))
        assert sudoku9.solve(question, limit=2) == [answer]
        for cell, digit in enumerate(question):
            if digit:
                without = [*question[:cell], 0, *question[cell + 1 :]]
                assert len(sudoku9.solve(without, limit=2)) == 2


def test_puzzles_depend_on_number_seed_and_side_alone() -> None:
    drawn = {
        (number, seed, held_out): tuple(sudoku9.draw(number, seed=seed, held_out=held_out)[0])
        for number in range(2)
        for seed in range(2)
        for held_out in (False, True)
    }
    assert len(set(drawn.values())) == 8
    assert tuple(sudoku9.draw(1, seed=1, held_out=True)[0]) == drawn[1, 1, True]


def test_puzzle_has_as_many_blanks_as_asked_for_or_as_can_be() -> None:
    minimal, solution = sudoku9.draw(0, seed=5, held_out=False)
    for blanks in (1, 30, 80):
        question, answer = sudoku9.draw(0, seed=5, held_out=False, blanks=blanks)
        assert answer == solution
        assert question.count(0) == min(blanks, minimal.count(0))
        assert all(clue in {0, given} for clue, given in zip(minimal, question, strict=True))


@pytest.mark.parametrize(
    "url", ["sudoku9:train?blanks=0", "sudoku9:test?blanks=82", "sudoku4:train?blanks=5"]
)
def test_blanks_that_no_puzzle_has_are_an_error(url: str) -> None:
    with pytest.raises(DataError, match="this is not a set of puzzles"):
        open_dataset(url, seq_len=0)


def test_url_says_how_many_blanks() -> None:
    inputs = open_dataset("sudoku9:test?count=3&blanks=9", seq_len=0).inputs
    assert (inputs == sudoku9.BLANK).sum(1).tolist() == [9, 9, 9]


def test_solver_finds_the_solution_of_a_hard_puzzle_and_none_of_a_wrong_one() -> None:
    cells = [0 if each == "." else int(each) for each in WORLDS_HARDEST]
    (answer,) = sudoku9.solve(cells, limit=2)
    assert is_solved(np.array(answer))
    assert all(given in {0, found} for given, found in zip(cells, answer, strict=True))
    assert sudoku9.solve([8, 8, *cells[2:]], limit=1) == []
    cells[1] = 7
    assert sudoku9.solve(cells, limit=1) == []


def boards() -> list[Path]:
    """The 200 puzzles of the package gymnasium-sudoku, which `make setup` brings."""
    found = importlib.util.find_spec("gymnasium_sudoku")
    assert found is not None
    assert found.submodule_search_locations
    return sorted(Path(found.submodule_search_locations[0]).glob("datasets/*/*.csv"))


def test_real_puzzles_are_read_and_have_one_solution() -> None:
    count = 0
    for path in boards():
        dataset = open_dataset(str(path), seq_len=0)
        assert (dataset.codec, dataset.num_tokens, dataset.seq_len) == ("sudoku9", 11, 81)
        for question, answer in zip(dataset.inputs, dataset.labels, strict=True):
            count += 1
            assert sudoku9.solve((question - 1).tolist(), limit=2) == [(answer - 1).tolist()]
    assert count == 200


QUESTION, ANSWER = ("".join(map(str, each)) for each in sudoku9.draw(0, seed=0, held_out=False))
LINE = f"{QUESTION},{ANSWER}"


@pytest.mark.parametrize(
    "text",
    [
        LINE,
        f"puzzle,solution\n{LINE}\n",
        f"source,question,answer,rating\nhere,{LINE},7\n",
        f"rating,answer,question\n3,{ANSWER},{QUESTION.replace('0', '.')}\n\n",
    ],
)
def test_csv_is_read_in_all_its_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "puzzles.csv").write_text(text)
    dataset = open_dataset(str(tmp_path / "puzzles.csv"), seq_len=0)
    assert dataset.num_samples == 1
    assert "".join(map(str, dataset.inputs[0] - 1)) == QUESTION
    assert "".join(map(str, dataset.labels[0] - 1)) == ANSWER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no puzzles"),
        ("puzzle,solution\n", "holds no puzzles"),
        (f"{LINE}\n123,456", "line 2: .*3 cells"),
        (f"{LINE}\n{'x' * 81},{ANSWER}", "line 2"),
        (f"{ANSWER}", "line 1"),
        (f"{ANSWER},{ANSWER[1:] + ANSWER[0]}", "a clue differs from the solution"),
        (f"{'0' * 81},{'1' * 81}", "the solution breaks the rules"),
    ],
)
def test_broken_csv_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "puzzles.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / "puzzles.csv"), seq_len=0)


@pytest.mark.parametrize("url", ["sudoku9:train?count=2", "sudoku4:train?count=5"])
def test_disguises_are_puzzles_with_the_same_rules(url: str) -> None:
    dataset = open_dataset(url, seq_len=0, augment=40)
    plain = open_dataset(url, seq_len=0)
    count, side = plain.num_samples, 9 if "9" in url else 4
    assert dataset.num_samples == 41 * count
    inputs, labels = dataset.rows(np.arange(dataset.num_samples))
    assert inputs[:count].tolist() == plain.inputs.tolist()
    assert len({row.tobytes() for row in inputs}) > 39 * count
    for number, (question, answer) in enumerate(zip(inputs, labels, strict=True)):
        grid = answer.reshape(side, side) - 1
        box = int(side**0.5)
        units = [*grid, *grid.T]
        units += [
            grid[r : r + box, c : c + box].ravel()
            for r in range(0, side, box)
            for c in range(0, side, box)
        ]
        assert all(sorted(unit.tolist()) == list(range(1, side + 1)) for unit in units)
        is_clue = question != 1
        assert (question[is_clue] == answer[is_clue]).all()
        assert is_clue.sum() == (plain.inputs[number % count] != 1).sum()
        if side == 9 and number < 20:
            assert len(sudoku9.solve((question - 1).tolist(), limit=2)) == 1


def test_disguise_depends_on_the_sample_alone() -> None:
    dataset = open_dataset("sudoku9:train?count=3", seq_len=0, augment=5)
    together = dataset.rows(np.arange(18))[0]
    for sample in (17, 4, 9):
        assert (dataset.rows(np.array([sample]))[0][0] == together[sample]).all()


def test_every_part_of_a_disguise_is_used() -> None:
    """Digits, transposition, bands, rows in bands: each cell and each digit can go anywhere."""
    grid = np.arange(81)[None].repeat(4000, 0)
    cells = np.zeros_like(grid)
    cells[:] = np.arange(81) % 9 + 2
    moved, _ = disguise(cells, cells, np.arange(4000))
    assert {tuple(np.unique(row)) for row in moved[:50]} == {tuple(range(2, 11))}
    names = {int(row[0]) for row in moved}
    assert names == set(range(2, 11))
    is_transposed = {bool((row.reshape(9, 9)[0] == row[0]).all()) for row in moved}
    assert is_transposed == {True, False}


def test_only_sudokus_can_be_disguised(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"prompt": "p", "response": "r"}]')
    with pytest.raises(DataError, match="only Sudokus can be disguised"):
        open_dataset(str(tmp_path / "data.json"), seq_len=0, augment=3)


# -- folders of TRM's public code ------------------------------------------------------------------


def folder(path: Path, **changes: object) -> str:
    """A folder of three mazes of four cells, as the public code writes them."""
    inputs = np.array([[1, 2, 3, 4], [2, 2, 1, 0], [4, 4, 4, 4]], dtype=np.uint8)
    labels = np.array([[1, 5, 3, 4], [2, 5, 0, 0], [4, 4, 4, 5]], dtype=np.uint8)
    sizes = {
        "pad_id": 0, "ignore_label_id": 0, "vocab_size": 6, "seq_len": 4, "sets": ["all"],
        "num_puzzle_identifiers": 5,
    }  # fmt: skip
    path.mkdir()
    (path / "dataset.json").write_text(json.dumps(sizes | changes))
    np.save(path / "all__inputs.npy", inputs)
    np.save(path / "all__labels.npy", labels)
    np.save(path / "all__puzzle_identifiers.npy", np.array([4, 0], np.int32))
    np.save(path / "all__puzzle_indices.npy", np.array([0, 2, 3], np.int32))
    return str(path)


@pytest.mark.parametrize("has_cache", [False, True])
def test_folder_of_the_public_code_is_read(tmp_path: Path, has_cache: bool) -> None:
    cache = Cache(str(tmp_path / "cache"), 10**9) if has_cache else None
    dataset = open_dataset(folder(tmp_path / "maze"), seq_len=0, cache=cache)
    assert (dataset.codec, dataset.num_tokens, dataset.seq_len) == ("grid", 6, 4)
    inputs, labels = dataset.rows(np.array([1, 0]))
    assert inputs.tolist() == [[2, 2, 1, 0], [1, 2, 3, 4]]
    assert labels.tolist() == [[2, 5, -100, -100], [1, 5, 3, 4]]


@pytest.mark.parametrize("has_cache", [False, True])
def test_folder_says_which_puzzle_a_row_belongs_to(tmp_path: Path, has_cache: bool) -> None:
    cache = Cache(str(tmp_path / "cache"), 10**9) if has_cache else None
    dataset = open_dataset(folder(tmp_path / "maze"), seq_len=0, cache=cache)
    assert dataset.puzzles_of(np.array([2, 0, 1])).tolist() == [0, 4, 4]
    assert dataset.num_puzzles == 5
    (tmp_path / "maze" / "all__puzzle_indices.npy").unlink()
    without = open_dataset(str(tmp_path / "maze"), seq_len=0, cache=cache)
    assert without.puzzles_of(np.array([2, 0, 1])).tolist() == [0, 0, 0]
    assert without.sha256 == dataset.sha256
    assert without.puzzles_sha256 != dataset.puzzles_sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("indices", [0, 2], "does not cut the 3 rows"),
        ("indices", [0, 2, 4], "does not cut the 3 rows"),
        ("indices", [0, 4, 3], "does not cut the 3 rows"),
        ("identifiers", [5, 0], "outside 0 to num_puzzle_identifiers"),
    ],
)
def test_puzzles_that_do_not_fit_are_told(
    tmp_path: Path, name: str, content: list[int], message: str
) -> None:
    url = folder(tmp_path / "maze")
    np.save(tmp_path / "maze" / f"all__puzzle_{name}.npy", np.array(content))
    with pytest.raises(DataError, match=message):
        open_dataset(url, seq_len=0)


def test_folder_without_an_ignored_label_counts_every_cell(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path / "maze", ignore_label_id=None), seq_len=0)
    assert dataset.labels.min() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 5}, "not both"),
        ({"vocab_size": 5}, "not below vocab_size 5"),
        ({"vocab_size": 300}, "at most 256"),
        ({"vocab_size": "many"}, "does not say vocab_size"),
        ({"ignore_label_id": [0]}, "does not say vocab_size"),
    ],
)
def test_folder_that_does_not_fit_is_told(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(folder(tmp_path / "maze", **changes), seq_len=0)


@pytest.mark.parametrize("name", ["inputs", "labels"])
@pytest.mark.parametrize("token", [256 + 2, (1 << 16) + 2, (1 << 16) - 1])
def test_token_of_no_byte_is_told(tmp_path: Path, name: str, token: int) -> None:
    url = folder(tmp_path / "maze")
    np.save(tmp_path / "maze" / f"all__{name}.npy", np.full((3, 4), token))
    with pytest.raises(DataError, match="not below vocab_size 6"):
        open_dataset(url, seq_len=0)


@pytest.mark.parametrize("name", ["all__inputs.npy", "all__labels.npy"])
def test_missing_or_broken_file_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    where = folder(tmp_path / "maze")
    (Path(where) / name).write_bytes(b"no array")
    with pytest.raises(DataError, match=name):
        open_dataset(where, seq_len=0)
    (Path(where) / name).unlink()
    with pytest.raises(DataError, match=name):
        open_dataset(where, seq_len=0)


def test_length_that_does_not_fit_is_told() -> None:
    with pytest.raises(DataError, match="a sample has 81 positions"):
        open_dataset("sudoku9:train?count=1", seq_len=80)
