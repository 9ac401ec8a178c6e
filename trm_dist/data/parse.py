"""Records from JSON, in the three usual spellings; pure, so that any process can do it.

A record has context/query/completion, instruction/input/output, or prompt/response.
"""

import json
from typing import Any, NamedTuple

import orjson

from trm_dist.errors import DataError

SPELLINGS = (
    ("context", "query", "completion"),
    ("input", "instruction", "output"),
    ("", "prompt", "response"),
)
"""Keys of context, query and completion; the first one of which the completion and a question are
there counts."""

_TEXT = {str}
"""Types of a record's values."""


class Record(NamedTuple):
    """One question and its answer."""

    context: str
    query: str
    completion: str


class Lines(NamedTuple):
    """What some lines hold."""

    records: list[Record]
    """Those that have a completion; the others teach nothing."""
    num_records: int
    """All of them."""
    num_lines: int


def parse_lines(url: str, raw: bytes, first_line: int = 0, first_record: int = 0) -> Lines:
    """Parse whole lines of one record each; blank ones are passed over.

    Args:
        url: Of the file, for messages.
        raw: The lines.
        first_line: How many lines of the file come before, for messages.
        first_record: How many records do.

    Raises:
        DataError: A line is not JSON, or not a record; the message names the place.
    """
    records = []
    lines = raw.removesuffix(b"\n").split(b"\n")
    num_records = 0
    for number, line in enumerate(lines, start=first_line + 1):
        if not line or line.isspace():
            continue
        record = as_record(url, first_record + num_records, _loads(url, line, number))
        num_records += 1
        if record.completion:
            records.append(record)
    return Lines(records, num_records, len(lines))


def as_record(url: str, number: int, item: Any) -> Record:
    """Return what was parsed as a record.

    Args:
        url: Of the file, for messages.
        number: Of the record, counted from 0, for messages.
        item: What was parsed.

    Raises:
        DataError: It is none.
    """
    keys = item.keys() if isinstance(item, dict) else ()
    for names in SPELLINGS:
        context, query, completion = names
        if completion in keys and (query in keys or context in keys):
            values = [item.get(name) or "" for name in names]
            if set(map(type, values)) == _TEXT:
                return Record(*values)
    found = f"keys {', '.join(sorted(map(str, keys)))}" if keys else type(item).__name__
    raise DataError(
        f"{url}: record {number} (counted from 0) is not a question and an answer in text: "
        f"{found}. Use context/query/completion, instruction/input/output or prompt/response."
    )


def not_json(url: str, reason: object, line: int, column: int) -> DataError:
    """Return the error that names a place which is not JSON."""
    return DataError(
        f"{url}, line {line}, column {column}: this is not JSON ({reason}). Mend the file; files "
        "with one record a line are named .jsonl."
    )


def not_text(url: str, error: UnicodeDecodeError) -> DataError:
    """Return the error that names a byte which is not text."""
    return DataError(f"{url}: byte {error.start} is not UTF-8 text.")


def _loads(url: str, raw: bytes, line: int) -> Any:
    """Parse a line: by orjson, or by json, which is slower, takes more, and says what is wrong.

    Both make the same strings, and of other values a record needs no more than whether they are
    empty.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise not_json(url, error.msg, line, error.colno) from error
    except UnicodeDecodeError as error:
        raise not_text(url, error) from error
    except (ValueError, RecursionError) as error:  # a huge number, a bottomless value
        raise not_json(url, error, line, 1) from error
