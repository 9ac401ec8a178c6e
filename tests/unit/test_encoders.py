"""Processes that encode lines: what they make is what is made without them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trm_dist.data.encoders import EncodedLines, _num_cores, answers, encode_lines, worthwhile
from trm_dist.data.parse import as_record, parse_lines
from trm_dist.data.records import RecordFile
from trm_dist.errors import DataError

L = 16
ROOT = Path(__file__).parents[2]

GOOD = b'{"prompt": "q", "response": "a"}'

ODD_LINES = [
    GOOD,
    b"",
    b" \t\r",
    b'{"prompt": "q", "response": ""}',
    '{"prompt": "їжак 学习 \\ud83d\\ude00 😀", "response": "é\\u0000\\u0003\\u001e\\n"}'.encode(),
    b'{"prompt": "\\ud800 alone", "response": "\\udc00"}',
    b'\xef\xbb\xbf{"prompt": "after a mark of the byte order", "response": "a"}',
    '{"prompt": "in UTF-16", "response": "a"}'.encode("utf-16-be"),
    b'{"prompt": "q", "response": "a", "score": NaN, "large": 123456789012345678901234567890}',
    b'{"prompt": "q", "response": "a", "huge": 1e999, "least": -Infinity}',
    b'{"prompt": "first", "prompt": "second", "response": "a"}',
    b'{"context": 0, "query": "q", "completion": "a"}',
    b'{"context": null, "query": false, "completion": "a"}',
    b'  {"instruction": "q", "input": "c", "output": "a longer answer than there is room"}  \r',
    b'{"prompt": "q", "response": "a", "deep": ' + b"[" * 300 + b"]" * 300 + b"}",
]


def blocks() -> Iterator[bytes]:
    for number in range(40):
        own = b'{"prompt": "%d", "response": "a"}' % number
        yield b"\n".join([*ODD_LINES[number % len(ODD_LINES) :], own, b""])


def is_same(one: EncodedLines, other: EncodedLines) -> bool:
    arrays = zip(
        (one.encoded.inputs, one.encoded.labels, one.encoded.is_cut),
        (other.encoded.inputs, other.encoded.labels, other.encoded.is_cut),
        strict=True,
    )
    counts = (one.num_records, one.num_lines) == (other.num_records, other.num_lines)
    return counts and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


def children() -> list[int]:
    """Return the processes that this one has started and that live."""
    pids = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for each in pids for pid in each.read_text().split()]


def helpers() -> list[int]:
    return [
        pid for pid in children()
        if b"trm_dist.data.encoders" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_line_is_read_as_json_of_the_standard_library_reads_it(line: bytes) -> None:
    found = parse_lines("x.jsonl", line)

    wanted = [as_record("x.jsonl", 0, json.loads(line))] if line.strip() else []
    assert (found.num_records, found.num_lines) == (len(wanted), 1)
    assert found.records == [each for each in wanted if each.completion]


@pytest.mark.parametrize("num_helpers", [1, 3])
def test_helpers_make_the_same_in_the_same_order(num_helpers: int) -> None:
    found = list(answers(blocks(), L, num_helpers))

    assert [block for block, _ in found] == list(blocks())
    for block, answer in found:
        assert answer is not None
        assert is_same(answer, encode_lines("", block, L))
    assert helpers() == []


def test_helpers_work_with_pipes_that_may_not_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm_dist.data.encoders._PIPE_BYTES", (1 << 31) - 1)

    assert None not in [answer for _, answer in answers(blocks(), L, 1)]


def test_no_helpers_leave_everything_to_the_caller() -> None:
    assert list(answers([GOOD, GOOD], L, 0)) == [(GOOD, None)] * 2


@pytest.mark.parametrize("broken", [b"{oops}\n", b'{"text": "t"}\n', b"\xff\n"])
def test_block_with_an_error_is_left_to_the_caller_and_the_others_are_done(broken: bytes) -> None:
    lines = [GOOD + b"\n"] * 5
    lines[2] = broken

    found = [answer is not None for _, answer in answers(lines, L, 1)]

    assert found == [True, True, False, True, True]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_helper_that_is_killed_costs_nothing_but_its_block(stop: signal.Signals) -> None:
    killed: list[int] = []

    def disturbed() -> Iterator[bytes]:
        for number, block in enumerate(blocks()):
            if number in {5, 20}:
                killed.extend(helpers())
                for pid in helpers():
                    os.kill(pid, stop)
            yield block

    found = list(answers(disturbed(), L, 2))

    assert len(killed) >= 2
    assert [block for block, _ in found] == list(blocks())
    assert 1 <= [answer for _, answer in found].count(None) <= len(killed)
    assert all(is_same(answer, encode_lines("", block, L)) for block, answer in found if answer)


def test_helpers_end_when_nobody_wants_the_rest() -> None:
    found = answers(blocks(), L, 2)
    next(found)
    assert helpers()

    found.close()

    assert helpers() == []


ASK_FOR_EVER = """
import itertools, sys
from trm_dist.data.encoders import answers
for block, answer in answers(itertools.repeat(b'{"prompt": "q", "response": "a"}'), 16, 2):
    print("ready", flush=True)
"""


def test_helpers_end_with_the_process_that_asked() -> None:
    command = [sys.executable, "-c", ASK_FOR_EVER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"ready\n"
        tasks = Path(f"/proc/{asking.pid}/task").glob("*/children")
        left = [pid for each in tasks for pid in each.read_text().split()]
        asking.kill()
        asking.stdout.read()  # helpers write elsewhere
    assert left
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)


def test_helpers_do_not_hear_ctrl_c() -> None:
    found = answers(blocks(), L, 2)
    next(found)

    pids = helpers()
    assert pids
    assert [os.getsid(pid) for pid in pids] == pids
    found.close()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[bytes]], str]:
    def write_file(lines: list[bytes]) -> str:
        (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
        return str(tmp_path / "data.jsonl")

    return write_file


@pytest.mark.parametrize("end", [[], [b""]], ids=["cut", "whole"])
def test_file_of_many_blocks_is_the_same_with_helpers_and_without(
    write: Callable[[list[bytes]], str], end: list[bytes]
) -> None:
    long = b'{"prompt": "%s", "response": "a"}' % (b"x" * 3_000_000)  # some blocks of its own
    url = write([*ODD_LINES * 800, long, *ODD_LINES * 800, GOOD, *end])
    files = [RecordFile(url) for _ in range(2)]

    alone, helped = (
        list(each.encoded(L, num_helpers)) for each, num_helpers in zip(files, (0, 2), strict=True)
    )

    assert len(alone) > 2
    for one, other in zip(alone, helped, strict=True):
        assert np.array_equal(one.inputs, other.inputs)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.is_cut, other.is_cut)
    assert files[0].sha256 == files[1].sha256
    assert files[0].num_skipped == files[1].num_skipped == 1600
    assert sum(len(each.is_cut) for each in alone) == 1600 * (len(ODD_LINES) - 3) + 2


@pytest.mark.parametrize("num_helpers", [0, 2])
def test_short_lines_become_no_larger_parts_than_long_ones(
    write: Callable[[list[bytes]], str], num_helpers: int
) -> None:
    url = write([GOOD, b"", *[GOOD] * 99, b""])

    parts = list(RecordFile(url).encoded(1 << 16, num_helpers))

    assert [len(each.is_cut) for each in parts] == [15, *[16] * 5, 5]


@pytest.mark.parametrize("num_helpers", [0, 2])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (b"{oops}", "line 60003, column 2: this is not JSON"),
        (b'{"text": "t"}', "record 40001 (counted from 0) is not a question and an answer"),
    ],
)
def test_error_far_into_a_file_names_its_place(
    write: Callable[[list[bytes]], str], num_helpers: int, broken: bytes, told: str
) -> None:
    url = write([*[GOOD, b"", GOOD] * 20_000, b"", GOOD, broken, *[GOOD] * 1000])

    with pytest.raises(DataError) as caught:
        list(RecordFile(url).encoded(L, num_helpers))

    assert told in str(caught.value)
    assert helpers() == []


def test_only_large_files_are_worth_helpers() -> None:
    cores = len(os.sched_getaffinity(0))

    assert worthwhile(None) == worthwhile(1000) == 0
    assert worthwhile(1 << 30) <= min(cores, 8)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("999999999 100000", None)],
)
def test_no_more_cores_are_used_than_a_container_may(
    tmp_path: Path, limit: str, expected: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")

    assert _num_cores(str(tmp_path / "cpu.max")) == (expected or len(os.sched_getaffinity(0)))
    assert _num_cores(str(tmp_path / "none")) == len(os.sched_getaffinity(0))
