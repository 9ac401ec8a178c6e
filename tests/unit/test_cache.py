"""Encoded data on disk: made once, whole or not at all, bounded, and not in workers' memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trm_dist.data.cache import Cache, Sink, cached, kept, remove
from trm_dist.data.dataset import Dataset, open_dataset

ROWS = np.arange(30, dtype=np.uint8).reshape(5, 6)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


class Maker:
    """Makes an entry of five samples and counts how often."""

    def __init__(self, rows: np.ndarray = ROWS) -> None:
        self.rows, self.count = rows, 0

    def __call__(self, sink: Sink) -> dict[str, str]:
        self.count += 1
        sink.write(self.rows[:2], self.rows[:2] + 100)
        sink.write(self.rows[2:], self.rows[2:] + 100)
        return {"url": "somewhere"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), 10**9)


def test_entry_is_made_once_and_says_what_was_written(cache: Cache) -> None:
    make = Maker()
    for _ in range(3):
        entry = cached(cache, {"a": 1}, make)
        assert entry.inputs.tolist() == ROWS.tolist()
        assert entry.labels.tolist() == (ROWS + 100).tolist()
        assert entry.meta["url"] == "somewhere"
    assert make.count == 1
    cached(cache, {"a": 2}, make)
    assert make.count == 2


@pytest.mark.parametrize("name", ["inputs.u8", "labels.u8", "meta.json"])
@pytest.mark.parametrize("size", [0, 7])
def test_entry_that_was_cut_is_made_anew(cache: Cache, name: str, size: int) -> None:
    make = Maker()
    cached(cache, {}, make)
    (entry,) = (each for each in Path(cache.directory).iterdir() if each.is_dir())
    os.truncate(entry / name, size)
    assert cached(cache, {}, make).inputs.tolist() == ROWS.tolist()
    assert make.count == 2


def test_what_fails_leaves_nothing(cache: Cache) -> None:
    def fail(sink: Sink) -> dict[str, str]:
        Maker()(sink)
        raise ValueError("broken data")

    with pytest.raises(ValueError, match="broken data"):
        cached(cache, {}, fail)
    assert kept(cache.directory) == []
    assert cached(cache, {}, Maker()).inputs.tolist() == ROWS.tolist()


PROGRAM = """
import os, sys, time
import numpy as np
from trm_dist.data.cache import Cache, cached
def make(sink):
    with open(sys.argv[2], "a") as file:
        file.write("made\\n")
    for value in range(4):
        sink.write(*[np.full((1, 8), value, np.uint8)] * 2)
        time.sleep(float(sys.argv[3]))
    return {"url": "u"}
entry = cached(Cache(sys.argv[1], 10**9), {}, make)
assert entry.inputs[:, 0].tolist() == [0, 1, 2, 3], entry.inputs
"""


def test_many_that_start_at_once_make_one_entry(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, cache.directory, str(log), "0.1"]
    running = [subprocess.Popen(command) for _ in range(5)]
    assert [each.wait(60) for each in running] == [0] * 5
    assert log.read_text() == "made\n"


def test_entry_of_a_process_that_was_killed_is_made_anew(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, cache.directory, str(log), "60"]
    ) as process:
        while not log.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [each.url for each in kept(cache.directory)] == [""]
    make = Maker()
    assert cached(cache, {}, make).inputs.tolist() == ROWS.tolist()
    assert [each.url for each in kept(cache.directory)] == ["somewhere"]


def test_oldest_that_nobody_uses_goes_when_all_are_too_large(tmp_path: Path) -> None:
    directory = str(tmp_path / "cache")
    make = "import sys\nfrom tests.unit.test_cache import *\n"
    make += "cached(Cache(sys.argv[1], 10**9), {'n': int(sys.argv[2])}, Maker())"
    for number in range(3):  # in processes that have ended, so nobody uses them
        command = [sys.executable, "-c", make, directory, str(number)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    size = kept(directory)[0].num_bytes
    oldest = kept(directory)[-1].name
    cached(Cache(directory, 3 * size + 10), {"n": 4}, Maker())
    names = [each.name for each in kept(directory)]
    assert len(names) == 3
    assert oldest not in names
    cached(Cache(directory, 0), {"n": 5}, Maker())  # this one and those that are in use stay
    assert len(kept(directory)) == 2


def test_entry_in_use_is_not_removed(cache: Cache) -> None:
    entry = cached(cache, {}, Maker())
    assert not remove(cache.directory, kept(cache.directory)[0].name)
    assert entry.inputs.tolist() == ROWS.tolist()


def test_changed_file_is_encoded_anew(cache: Cache, write: Callable[[str, str], str]) -> None:
    line = '{"prompt": "p", "response": "%s"}\n'
    url = write("data.jsonl", line % "a")
    first = open_dataset(url, seq_len=8, overlong="truncate", cache=cache)
    again = open_dataset(url, seq_len=8, overlong="truncate", cache=cache)
    assert again.identity() == first.identity()
    assert len(kept(cache.directory)) == 1
    write("data.jsonl", line % "b")
    second = open_dataset(url, seq_len=8, overlong="truncate", cache=cache)
    assert second.sha256 != first.sha256
    assert second.labels.tolist() != first.labels.tolist()


@pytest.mark.parametrize("url", ["sudoku4:train?count=50", "text"])
def test_cache_changes_nothing_but_the_time(
    cache: Cache, write: Callable[[str, str], str], url: str
) -> None:
    if url == "text":
        lines = [f'{{"prompt": "question {n}", "response": "{"x" * n}"}}' for n in range(20)]
        url = write("data.jsonl", "\n".join(lines))
    plain = open_dataset(url, seq_len=0, overlong="truncate")
    for _ in range(2):
        found = open_dataset(url, seq_len=0, overlong="truncate", cache=cache)
        assert found.identity() == plain.identity()
        assert found.notes == plain.notes
        samples = np.array([3, 1, 7])
        for ours, theirs in zip(found.rows(samples), plain.rows(samples), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()


def test_cache_that_cannot_be_written_is_told_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    dataset = open_dataset(
        "sudoku4:train?count=9", seq_len=0, overlong="truncate",
        cache=Cache(str(tmp_path / "file" / "cache"), 1),
    )  # fmt: skip
    assert dataset.num_samples == 9
    assert "cannot be used" in caplog.text


def test_memory_does_not_grow_with_the_data(cache: Cache) -> None:
    part = np.zeros((4096, 1024), np.uint8)

    def large(sink: Sink) -> dict[str, object]:
        for _ in range(32):
            sink.write(part, part)
        return {
            "url": "u", "num_tokens": 2, "codec": "bytes", "sha256": "", "notes": {},
        }  # fmt: skip

    entry = cached(cache, {}, large)
    dataset = Dataset("u", entry.inputs, entry.labels, 2, "bytes", "", {}, entry.pages)
    before = _resident_bytes()
    for start in range(0, dataset.num_samples, 64):
        dataset.rows(np.arange(start, start + 64))
    assert _resident_bytes() - before < 20e6, "270 MB were read"


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
