"""Lines of records by pyarrow, a block at a time, where it is installed; faster than one by one.

Only of plain blocks, and with the same arrays as `parse` and `codec` make of them: each line is one
object, and all lines spell a question and an answer alike, in text. What is not plain, errors too,
is left to those two. In values that no sample holds, pyarrow lets pass what json does not: numbers
such as Inf, and digits and levels by the thousand.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from trm_dist.data.codec import Encoded, pack
from trm_dist.data.parse import SPELLINGS

_HIDING = re.compile(rb"\\u00(0[03]|1[eE]|[67])")
"""Escapes of the codec's marks, and of letters, which a key is looked for by."""

Cut = Callable[[Any, Any], tuple[Any, Any]]
"""What is wanted of a text, of where it starts and ends."""


def encode_plain(raw: bytes, seq_len: int) -> tuple[Encoded, int] | None:
    """Encode the records of whole lines.

    Args:
        raw: The lines.
        seq_len: L.

    Returns:
        The arrays and the number of lines, each of which is a record; None: they are not plain.
    """
    lines = raw.removesuffix(b"\n")
    names = next((each for each in SPELLINGS if b'"%s"' % each[-1].encode() in lines), None)
    num_lines = _count(lines)
    is_hiding = _has(lines, b"\\u") and _HIDING.search(lines)
    if names is None or not num_lines or is_hiding:
        return None
    try:
        # pyarrow's parser leaves wrong UTF-8 as it is.
        _text_array(lines).validate(full=True)
        table = _read(lines, names)
        columns = [table.column(each).combine_chunks() for each in names]
    except (pa.ArrowException, OverflowError):  # the latter for 2 GiB
        return None
    context, query, completion = columns
    is_asked = not (context.null_count and query.null_count)
    if len(completion) != num_lines or completion.null_count or not is_asked:
        return None
    most = seq_len + 1  # one more than fits shows that it is cut

    def last(start: Any, end: Any) -> tuple[Any, Any]:
        return np.maximum(start, end - most), end

    def first(start: Any, end: Any) -> tuple[Any, Any]:
        return start, np.minimum(end, start + most)

    records = zip(_cut(context, last), _cut(query, last), _cut(completion, first), strict=True)
    return pack((each for each in records if each[-1]), seq_len), num_lines


def _count(lines: bytes) -> int:
    """Return how many lines there are; 0: not each of them begins and ends as an object does."""
    framed = np.frombuffer(b"}\n%b\n{" % lines, np.uint8)
    ends = np.flatnonzero(framed == ord("\n"))
    is_whole = (framed[ends - 1] == ord("}")) & (framed[ends + 1] == ord("{"))
    return len(ends) - 1 if is_whole.all() else 0


def _has(text: bytes, pair: bytes) -> bool:
    tokens = np.frombuffer(text, np.uint8)
    return bool(np.any((tokens[:-1] == pair[0]) & (tokens[1:] == pair[1])))


def _read(lines: bytes, names: tuple[str, ...]) -> Any:
    return pa.json.read_json(
        pa.BufferReader(lines),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
        parse_options=pa.json.ParseOptions(
            explicit_schema=pa.schema([(each, pa.string()) for each in names]),
            unexpected_field_behavior="ignore",
        ),
    )


def _text_array(text: bytes) -> Any:
    offsets = np.array([0, len(text)], np.int32)
    return pa.StringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(text))


def _cut(column: Any, wanted: Cut) -> Iterator[bytes]:
    """Yield what is wanted of each text; nothing where it is null."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset :][: len(column) + 1].astype(np.int64)
    text = data.to_pybytes() if data else b""
    for start, end in zip(*(each.tolist() for each in wanted(ends[:-1], ends[1:])), strict=True):
        yield text[start:end]
