"""Blocks of lines by pyarrow: what it makes is what is made record by record, or nothing."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.unit.test_encoders import GOOD, ODD_LINES, is_same
from trm_dist.data.columns import encode_plain
from trm_dist.data.encoders import EncodedLines, answers, encode_lines
from trm_dist.errors import DataError

L = 16
SPELLED = [
    {"context": "c", "query": "q", "completion": "a"},
    {"context": "", "query": "a question of many letters", "completion": "їжак"},
    {"query": '\\ " / \b\f\n\r\t', "completion": "學習 😀 {}[],:"},
    {"context": "a context alone, which is long", "completion": "and an answer that is long"},
    {"context": None, "query": "q", "completion": ""},
]
NAMES = [("context", "query", "completion"), ("input", "instruction", "output")]


def block_of(records: Iterable[object], *, ascii_only: bool = False) -> bytes:
    lines = (json.dumps(each, ensure_ascii=ascii_only) for each in records)
    return "".join(f"{each}\n" for each in lines).encode()


def made(raw: bytes) -> EncodedLines | None:
    found = encode_plain(raw, L)
    return found and EncodedLines(found[0], found[1], found[1])


def other(value: bytes) -> bytes:
    """Return a line with one more value, which is not looked at."""
    return b'{"prompt": "q", "response": "a", "other": %b}' % value


def is_right(raw: bytes) -> bool:
    """Tell whether nothing was made, or the same as record by record."""
    found = made(raw)
    return found is None or is_same(found, encode_lines("", raw, L))


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_plain_block_becomes_the_same_arrays(names: tuple[str, ...], ascii_only: bool) -> None:
    spelling = dict(zip(NAMES[0], names, strict=True))
    other = {"id": 7, "tags": ["x", {"completion ": 1}], "score": None}
    records = [
        {spelling[name]: value for name, value in each.items()} | other for each in SPELLED[:3]
    ]
    raw = block_of(records * 50, ascii_only=ascii_only)

    found = made(raw)

    assert found is not None
    assert found.num_records == 150
    assert is_same(found, encode_lines("", raw, L))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_prompt_and_response_become_the_same_arrays(end: bytes) -> None:
    raw = block_of([{"prompt": "q" * n, "response": "a" * (20 - n)} for n in range(21)])
    raw = raw.removesuffix(b"\n") + end

    found = made(raw)

    assert found is not None
    assert is_same(found, encode_lines("", raw, L))


@pytest.mark.parametrize(
    "records", [SPELLED[:3] + SPELLED[4:], SPELLED[:1] + SPELLED[3:4], SPELLED[3:4]]
)
def test_empty_values_and_keys_that_are_not_everywhere_are_seen(records: list[object]) -> None:
    found = made(block_of(records))

    assert found is not None
    assert is_same(found, encode_lines("", block_of(records), L))


@pytest.mark.parametrize(
    "line",
    [
        *ODD_LINES[2:3],
        *ODD_LINES[4:8],
        b'{"prompt": "first", "prompt": "second", "response": "a"}',
        b'{"prompt": "q", "response": null}',
        b'{"prompt": 0, "response": "a"}',
        b'{"prompt": ["q"], "response": "a"}',
        b'{"response": "a"}',
        b'{"prompt": "q"}',
        b'{"query": "asked elsewhere", "response": "a"}',
        b'{"completion": null, "query": "q", "prompt": "q", "response": "a"}',
        b'{"compl\\u0065tion": null, "query": "q", "prompt": "q", "response": "a"}',
        b'{"query": "q", "completion": "a"}',
        b'{"prompt": "q", "response": "a", "other": "\xff"}',
        b'{"prompt": "q\xc3", "response": "a"}',
        b'{"prompt": "q", "response": "\xed\xa0\x80"}',
        b'{"prompt": "q", "response": "\\udc00"}',
        b'{"prompt": "a mark\\u001E", "response": "a"}',
        b'{"prompt": "q", "response": "a"} {"prompt": "q", "response": "a"}',
        b'{"prompt": "q",\n"response": "a"} {"prompt": "q", "response": "a"}',
        b'{"prompt": "q", "response": "a"}}',
        b'{{"prompt": "q", "response": "a"}',
        b'{"prompt": "q", "response": "a",}',
        b'{"prompt": "q", "response": "a\tb"}',
        b'{"prompt": "q", "response": "\\x"}',
        other(b"+1"),
        other(b"[1,]"),
        b'{"": 0.5, "prompt": "q", "response": "a"}',
        b'["q", "a"]',
        b"null",
        b"{}",
        b"\x00",
    ],
)
def test_what_is_not_plain_is_left_alone(line: bytes) -> None:
    assert made(b"%b\n%b\n%b\n" % (GOOD, line, GOOD)) is None
    assert made(b"%b\n%b" % (GOOD, line)) is None
    assert made(b"%b\n%b\n" % (line, GOOD)) is None
    assert is_right(b"%b\n" % line)


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_odd_line_is_never_read_otherwise(line: bytes) -> None:
    assert is_right(line)
    assert is_right(b"%b\n%b\n%b\n" % (GOOD, line, GOOD))


@pytest.mark.parametrize(
    "line",
    [
        b'{"": "c", "prompt": "q", "response": "a"}',
        b'{"": "c", "response": "a"}',
        other(b"[" * 1023 + b"]" * 1023),
        other(b"9" * 4000 + b".0"),
        other(b'"Infer Info NaN"'),
    ],
)
def test_what_is_seldom_but_plain_is_made(line: bytes) -> None:
    found = made(line)

    assert found is not None
    assert is_same(found, encode_lines("", line, L))


def test_lines_that_ask_in_different_keys_are_left_alone() -> None:
    assert made(block_of([SPELLED[2], SPELLED[3]])) is None


@pytest.mark.parametrize("raw", [b"", b"\n", b"\n\n", b" \n"])
def test_nothing_is_left_alone(raw: bytes) -> None:
    assert made(raw) is None


@pytest.mark.parametrize("seed", range(8))
def test_damaged_blocks_are_never_read_otherwise(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [b'"', b"\\", b"{", b"}", b"\n", b"}\n{", b",", b":", b"\\u00", b"\\ud83d", b"\xd0",
              b" ", b"null", b'"completion"', b'"query": ', b"\x1e", b"\r"]  # fmt: skip
    num_made = 0
    for _ in range(500):
        records = chance.choices(SPELLED, k=chance.randint(1, 4))
        raw = bytearray(block_of(records, ascii_only=chance.random() < 0.5))
        for _ in range(chance.randint(0, 2)):
            start = chance.randrange(len(raw))
            raw[start : start + chance.randint(0, 2)] = chance.choice(pieces)
        found = made(bytes(raw))
        try:
            wanted = encode_lines("", bytes(raw), L)
        except DataError:
            assert found is None, bytes(raw)
            continue
        assert found is None or is_same(found, wanted), bytes(raw)
        num_made += found is not None
    assert num_made > 100


@pytest.mark.parametrize("error", ["", "ImportError", "ValueError", "AttributeError"])
def test_helpers_do_the_same_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    loaded = tmp_path / "loaded"
    if error:
        (tmp_path / "pyarrow.py").write_text(f"open({str(loaded)!r}, 'w'); raise {error}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    blocks = [block_of(SPELLED), b"\n".join([*ODD_LINES, b""]), block_of(SPELLED[:2])]

    found = list(answers(blocks, L, 1))

    assert loaded.exists() == bool(error)
    for block, answer in found:
        assert answer is not None
        assert is_same(answer, encode_lines("", block, L))
