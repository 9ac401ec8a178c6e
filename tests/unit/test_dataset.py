"""Data sets as arrays, opened by URL."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from trm_dist.data.cache import Cache
from trm_dist.data.codec import END, decode
from trm_dist.data.dataset import Dataset, open_dataset
from trm_dist.data.sudoku import draw
from trm_dist.errors import DataError

Write = Callable[..., str]

SMALL = Dataset(
    url="small",
    inputs=np.arange(12, dtype=np.uint8).reshape(4, 3) + 200,
    labels=np.arange(12, dtype=np.uint8).reshape(4, 3) + 100,
    num_tokens=256,
    codec="bytes",
    sha256="abc",
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(*completions: str) -> str:
        records = [{"prompt": "question", "response": each} for each in completions]
        (tmp_path / "data.json").write_text(json.dumps(records))
        return str(tmp_path / "data.json")

    return write_file


def opened(url: str, seq_len: int = 0) -> Dataset:
    return open_dataset(url, seq_len=seq_len, overlong="truncate")


def message_of(url: str, seq_len: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(url, seq_len=seq_len, overlong="drop")
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "seed", "held_out"),
    [
        ("sudoku4:train?count=9", 0, False),
        ("sudoku4:train?count=9&seed=3", 3, False),
        ("sudoku4:test?seed=4&count=9", 4, True),
    ],
)
def test_sudoku_is_what_its_url_says(url: str, seed: int, held_out: bool) -> None:
    dataset = opened(url)

    puzzles = draw(9, seed=seed, held_out=held_out)
    assert np.array_equal(dataset.inputs, puzzles.questions)
    assert np.array_equal(dataset.labels, puzzles.solutions)


@pytest.mark.parametrize("url", ["sudoku4:test", "sudoku4:test?", "sudoku4:test?seed=0"])
def test_sudoku_has_1000_held_out_puzzles_unless_told(url: str) -> None:
    assert opened(url).num_samples == 1000


@pytest.mark.parametrize("seq_len", [0, 16])
def test_sudoku_has_16_cells_and_6_tokens(seq_len: int) -> None:
    dataset = opened("sudoku4:train?count=2", seq_len)

    assert (dataset.seq_len, dataset.num_tokens, dataset.codec) == (16, 6, "sudoku4")
    assert dataset.notes == {}


def test_sudoku_digest_is_that_of_its_puzzles() -> None:
    puzzles = draw(5, seed=1, held_out=True)

    dataset = opened("sudoku4:test?count=5&seed=1")

    content = puzzles.questions.tobytes() + puzzles.solutions.tobytes()
    assert dataset.sha256 == sha256(content).hexdigest()


@pytest.mark.parametrize(
    "url",
    [
        "sudoku4:",
        "sudoku4:valid",
        "sudoku4:train?count=0",
        "sudoku4:train?count=-3",
        "sudoku4:train?count=100001",
        "sudoku4:train?count=many",
        "sudoku4:train?count=",
        "sudoku4:train?size=3",
        "sudoku4:train?count",
        "sudoku4:train?seed=1.5",
    ],
)
def test_sudoku_url_that_says_nothing_useful_is_an_error(url: str) -> None:
    message = message_of(url)

    assert message.startswith(f"--dataset {url}: this is not a set of puzzles")
    assert "Write sudoku4:train or sudoku4:test" in message


def test_sudoku_of_another_length_is_an_error() -> None:
    message = message_of("sudoku4:train?count=2", 81)

    assert message.startswith("--seq-len 81 does not fit sudoku4:train?count=2")


@pytest.mark.parametrize(("seq_len", "positions"), [(0, 256), (12, 12), (300, 300)])
def test_text_has_the_wanted_length(write: Write, seq_len: int, positions: int) -> None:
    dataset = opened(write("one", "two"), seq_len)

    assert dataset.inputs.shape == dataset.labels.shape == (2, positions)
    assert (dataset.num_tokens, dataset.codec) == (256, "bytes")


def test_text_keeps_the_order_of_records(write: Write) -> None:
    dataset = opened(write("one", "two", "три"))

    assert [decode(row) for row in dataset.labels] == ["one", "two", "три"]


def test_text_digest_is_that_of_the_file(write: Write) -> None:
    url = write("one")

    assert opened(url).sha256 == sha256(Path(url).read_bytes()).hexdigest()


def test_cut_records_are_counted_when_truncated(write: Write) -> None:
    dataset = opened(write("fits", "", "is too long", "is too long as well"), 8)

    assert dataset.num_samples == 3
    assert dataset.notes == {"truncated": 2, "dropped": 0, "skipped": 1}


def test_cut_records_are_left_out_when_dropped(write: Write) -> None:
    url = write("is too long", "fits", "", "too")

    dataset = open_dataset(url, seq_len=8, overlong="drop")

    assert [decode(row) for row in dataset.labels] == ["fits", "too"]
    assert dataset.notes == {"truncated": 0, "dropped": 1, "skipped": 1}


def test_dropping_every_record_is_an_error(write: Write) -> None:
    url = write("one", "two")

    assert message_of(url, 4).startswith(f"{url}: all 2 records are longer than --seq-len 4")


def test_rows_are_the_samples_asked_for() -> None:
    inputs, labels = SMALL.rows(np.array([2, 0, 2]))

    assert inputs.tolist() == [[206, 207, 208], [200, 201, 202], [206, 207, 208]]
    assert labels.tolist() == [[106, 107, 108], [100, 101, 102], [106, 107, 108]]
    assert inputs.dtype == labels.dtype == np.int64


def test_labels_that_count_nowhere_are_marked() -> None:
    _, labels = replace(SMALL, ignored=101).rows(np.array([0, 1]))

    assert labels.tolist() == [[100, -100, 102], [103, 104, 105]]


@pytest.mark.parametrize("has_cache", [False, True])
def test_text_counts_up_to_its_end_mark(write: Write, tmp_path: Path, has_cache: bool) -> None:
    cache = Cache(str(tmp_path / "cache"), 10**9) if has_cache else None
    _, labels = open_dataset(write("ab", "abcd"), seq_len=4, cache=cache).rows(np.arange(2))

    assert labels.tolist() == [[97, 98, END, -100], [97, 98, 99, 100]]


def test_rows_of_no_samples_are_empty() -> None:
    inputs, labels = SMALL.rows(np.empty(0, dtype=np.int64))

    assert inputs.shape == labels.shape == (0, 3)


def test_sizes_are_those_of_the_arrays() -> None:
    assert (SMALL.num_samples, SMALL.seq_len) == (4, 3)


def test_identity_is_what_a_resume_compares() -> None:
    assert SMALL.identity() == {
        "url": "small",
        "sha256": "abc",
        "num_samples": 4,
        "codec": "bytes",
        "num_tokens": 256,
        "num_puzzles": 1,
        "puzzles_sha256": "",
    }
