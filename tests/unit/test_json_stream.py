"""JSON lists element by element: the same values as json.loads, wherever the text is cut."""

import io
import json
import random
import tracemalloc
from collections.abc import Callable

import pytest

from trm_dist.data.json_stream import BrokenJsonError, NoListError, elements

VALUES = [
    {"a": [1, -2.5e3, {"b": None}], "c": "quo\"te \\ їжак \U0001f994 \n"},
    [], {}, "", 0, -17, 1e300, True, False, None, [[[]]], "]},", "ende\\",
]  # fmt: skip


def in_steps(raw: bytes, size: int) -> Callable[[int], bytes]:
    """A file that gives a few bytes at a time, whatever is asked for."""
    file = io.BytesIO(raw)
    return lambda _: file.read(size)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_values_are_those_of_json_wherever_the_text_is_cut(
    size: int, indent: int | None, is_ascii: bool
) -> None:
    alone = json.dumps(VALUES, indent=indent, ensure_ascii=is_ascii)
    other = json.dumps({"n": 1234567, "meta": VALUES, "data": VALUES, "z": 0}, indent=indent)
    for text in (alone, f" \r\n{alone}\t\n", other):
        assert list(elements(in_steps(text.encode(), size))) == VALUES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_encoding_is_found_out(encoding: str) -> None:
    raw = json.dumps(VALUES, ensure_ascii=False).encode(encoding)
    assert list(elements(in_steps(raw, 10))) == VALUES


def place_of_error(text: str) -> tuple[int, int] | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno, error.colno
    return None


def test_texts_that_json_refuses_are_refused_at_the_same_place() -> None:
    """Characters taken away, put in and changed at random."""
    chance = random.Random(3)
    good = json.dumps({"data": [{"a": "x\\u00e9", "n": [1.5, True]}] * 3}, indent=1)
    num_broken = 0
    for _ in range(3000):
        at = chance.randrange(len(good))
        text = (
            good[:at] + chance.choice(["", *'{}[],:"\\ \n0et']) + good[at + chance.randint(0, 3) :]
        )
        place = place_of_error(text)
        if place:
            num_broken += 1
            with pytest.raises(BrokenJsonError) as caught:
                list(elements(in_steps(text.encode(), chance.choice([1, 5, 1000]))))
            assert (caught.value.line, caught.value.column) == place, text
    assert num_broken > 1000


@pytest.mark.parametrize("text", ['{"data": {}}', "{}", '{"list": []}', "3", '"data"', "null"])
def test_text_without_a_list_is_told(text: str) -> None:
    with pytest.raises(NoListError):
        list(elements(in_steps(text.encode(), 4)))


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_wrong_byte_has_its_place_in_the_whole_text(size: int) -> None:
    raw = '["abc", "їжак", "'.encode() + b"\xd1" + b'"]'
    with pytest.raises(UnicodeDecodeError) as caught:
        list(elements(in_steps(raw, size)))
    assert caught.value.start == len(raw) - 3


@pytest.mark.parametrize("is_broken", [False, True])
def test_memory_does_not_grow_with_the_text_even_if_it_is_broken(is_broken: bool) -> None:
    record = b'{"prompt": "' + b"x" * 1000 + b'"},'
    parts = [b'[{"broken" 1},' if is_broken else b"[", *[record * 500] * 60, b"0]"]  # 30 MB
    count = 0
    tracemalloc.start()
    try:
        for _ in elements(lambda _: parts.pop(0) if parts else b""):
            count += 1
    except BrokenJsonError:
        assert is_broken
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == (0 if is_broken else 30_001)
    assert peak < 12e6
