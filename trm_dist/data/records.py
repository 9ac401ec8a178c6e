"""Text records from JSON and JSONL, local or at any fsspec URL, in the three usual spellings.

Accepted: a list of records, `{"metadata": ..., "data": [...]}`, or one record a line (.jsonl,
.ndjson). A record has context/query/completion, instruction/input/output, or prompt/response.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from trm_dist.errors import DataError

_SPELLINGS = (
    # context, query, completion; the first two may be missing, but not both
    ("context", "query", "completion"),
    ("input", "instruction", "output"),
    ("", "prompt", "response"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """One question and its answer."""

    context: str
    query: str
    completion: str


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The records of a file and what identifies its content."""

    records: list[Record]
    num_skipped: int
    """Records with an empty completion, which teach nothing."""
    sha256: str


def read_records(url: str) -> RecordFile:
    """Read a file of records.

    Raises:
        DataError: The file is missing, cannot be read or parsed, or a record lacks its keys; the
            message names the place.
    """
    raw = _read(url)
    is_lines = url.rsplit("?", 1)[0].endswith((".jsonl", ".ndjson"))
    items = _parse_lines(url, raw) if is_lines else _parse(url, raw)
    records = [_record(url, number, item) for number, item in enumerate(items)]
    kept = [record for record in records if record.completion]
    if not records:
        raise DataError(f"{url} holds no records. Give a file with at least one.")
    if not kept:
        raise DataError(f"{url}: all {len(records)} records have an empty completion.")
    return RecordFile(kept, len(records) - len(kept), hashlib.sha256(raw).hexdigest())


def _read(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
            return content
    except FileNotFoundError as error:
        raise DataError(f"--dataset {url}: there is no such file. Check the path.") from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"--dataset {url} cannot be read: {error}. Check the URL.") from error


def _parse(url: str, raw: bytes) -> list[Any]:
    content = _json(url, raw, 1)
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        raise DataError(
            f'{url} is JSON, but neither a list of records nor an object with a list in "data".'
        )
    return content


def _parse_lines(url: str, raw: bytes) -> Iterator[Any]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield _json(url, line, number)


def _json(url: str, raw: bytes, first_line: int) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{url}, line {line}, column {error.colno}: this is not JSON ({error.msg}). Mend the "
            "file; files with one record a line are named .jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: byte {error.start} is not UTF-8 text.") from error


def _record(url: str, number: int, item: Any) -> Record:
    keys = item.keys() if isinstance(item, dict) else ()
    for context, query, completion in _SPELLINGS:
        if completion in keys and (query in keys or context in keys):
            values = [item.get(key) or "" for key in (context, query, completion)]
            if all(isinstance(value, str) for value in values):
                return Record(*values)
    found = f"keys {', '.join(sorted(map(str, keys)))}" if keys else type(item).__name__
    raise DataError(
        f"{url}: record {number} (counted from 0) is not a question and an answer in text: "
        f"{found}. Use context/query/completion, instruction/input/output or prompt/response."
    )
