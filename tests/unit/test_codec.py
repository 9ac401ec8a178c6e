"""Text to bytes and back: every language, cut where it hurts least."""

import numpy as np
import pytest

from trm_dist.data import codec
from trm_dist.data.codec import END, NUM_TOKENS, PAD, SEPARATOR, Encoded, decode


def encode(context: str, query: str, completion: str, seq_len: int) -> Encoded:
    """One record, as a row."""
    found = codec.encode([(context, query, completion)], seq_len)
    return Encoded(found.inputs[0], found.labels[0], found.is_cut[0])


def question(context: str, query: str, seq_len: int = 16) -> bytes:
    return encode(context, query, "x", seq_len).inputs.tobytes()


def answer(completion: str, seq_len: int = 16) -> list[int]:
    return encode("", "q", completion, seq_len).labels.tolist()


def test_marks_are_golden() -> None:
    assert (NUM_TOKENS, PAD, END, SEPARATOR) == (256, 0x00, 0x03, 0x1E)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "Додай докстрінг, її ґанок", "🙂👩‍👩‍👧", "日本語", 'a\n\tb \\ "c"', "x" * 63],
)
def test_answer_comes_back_as_it_was(text: str) -> None:
    labels = encode("", "q", text, 64).labels

    assert decode(labels) == text


def test_question_is_context_separator_query() -> None:
    assert question("abc", "de") == b"abc\x1ede" + bytes(10)


def test_question_without_context_has_no_separator() -> None:
    assert question("", "abc") == b"abc" + bytes(13)


def test_question_is_utf8() -> None:
    assert question("", "їжак", 8) == "їжак".encode()


def test_long_context_loses_its_start() -> None:
    assert question("0123456789abcdef", "query") == b"6789abcdef\x1equery"


def test_long_query_loses_its_start_after_all_context() -> None:
    assert question("context", "0123456789abcdefgh") == b"23456789abcdefgh"


def test_question_that_fits_exactly_stays_whole() -> None:
    assert question("0123456789", "query") == b"0123456789\x1equery"


def test_answer_is_completion_and_end_then_nothing() -> None:
    assert answer("hi", 6) == [ord("h"), ord("i"), END, PAD, PAD, PAD]


def test_empty_answer_is_the_end_mark() -> None:
    assert answer("", 3) == [END, PAD, PAD]


def test_long_answer_loses_its_end() -> None:
    assert bytes(answer("0123456789", 4)) == b"0123"


def test_answer_cut_inside_a_letter_decodes() -> None:
    assert decode(answer("її", 3)) == "ї\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("mark", ["\x00", "\x03", "\x1e"])
def test_marks_inside_text_become_spaces(mark: str) -> None:
    encoded = encode(f"a{mark}b", f"c{mark}d", f"e{mark}f", 16)

    assert encoded.inputs.tobytes() == b"a b\x1ec d" + bytes(9)
    assert decode(encoded.labels) == "e f"


def test_other_control_bytes_stay() -> None:
    assert decode(answer("a\n\t\x01\x7fb")) == "a\n\t\x01\x7fb"


def test_lone_surrogate_becomes_question_mark() -> None:
    assert question("", "a\ud800b") == b"a?b" + bytes(13)


@pytest.mark.parametrize(
    ("context", "query", "completion", "is_cut"),
    [
        ("", "12345678", "1234567", False),
        ("123", "4567", "", False),
        ("1234", "4567", "", True),
        ("", "123456789", "", True),
        ("", "q", "12345678", True),
        ("", "їїїї", "ї", False),
        ("", "їїїїї", "ї", True),
        ("", "q", "їїїї", True),
    ],
)
def test_cut_is_told_when_bytes_do_not_fit(
    context: str, query: str, completion: str, is_cut: bool
) -> None:
    assert encode(context, query, completion, 8).is_cut == is_cut


def test_arrays_have_length_and_type() -> None:
    encoded = encode("c", "q", "a", 11)

    assert encoded.inputs.shape == encoded.labels.shape == (11,)
    assert encoded.inputs.dtype == encoded.labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([65, 66, END, 67], "AB"),
        ([END, 65], ""),
        ([65, PAD, PAD], "A"),
        ([PAD, PAD], ""),
        ([], ""),
        ([0xFF, 65, 0xC3, END], "\N{REPLACEMENT CHARACTER}A\N{REPLACEMENT CHARACTER}"),
        ([0xD0, 0xB4], "д"),
    ],
)
def test_decode_reads_up_to_the_end(tokens: list[int], text: str) -> None:
    assert decode(np.array(tokens, dtype=np.int64)) == text


def test_records_are_rows_in_their_order() -> None:
    records = [("c", "q", "a"), ("", "longer than that", "b" * 20), ("", "", "")]

    found = codec.encode(records, 8)

    assert found.inputs.shape == found.labels.shape == (3, 8)
    assert found.is_cut.tolist() == [False, True, False]
    for row, record in enumerate(records):
        alone = codec.encode([record], 8)
        assert (found.inputs[row] == alone.inputs[0]).all()
        assert (found.labels[row] == alone.labels[0]).all()
