"""Text records from JSON and JSONL, local or at any fsspec URL, in the three usual spellings.

Accepted: a list of records, `{"metadata": ..., "data": [...]}`, or one record a line (.jsonl,
.ndjson). A record has context/query/completion, instruction/input/output, or prompt/response.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import fsspec

from trm_dist.data.json_stream import BrokenJsonError, NoListError, elements
from trm_dist.errors import DataError

_SPELLINGS = (
    # context, query, completion; the first two may be missing, but not both
    ("context", "query", "completion"),
    ("input", "instruction", "output"),
    ("", "prompt", "response"),
)


_IDENTIFYING = ("ETag", "etag", "mtime", "created", "LastModified", "ino", "generation", "version")
"""What file systems say of a file that changes with its content."""


class Record(NamedTuple):
    """One question and its answer."""

    context: str
    query: str
    completion: str


class RecordFile:
    """The records of a file, one after the other; it is never in memory as a whole.

    Reading it to the end counts what was skipped and identifies the content.
    """

    def __init__(self, url: str, on_read: Callable[[int], object] = lambda _: None) -> None:
        """Name the file.

        Args:
            url: A path or any fsspec URL.
            on_read: Called now and then with the number of bytes that were read so far.
        """
        self._url, self._on_read = url, on_read
        self._hash = hashlib.sha256()
        self._num_read = 0
        self.num_skipped = 0
        """Records with an empty completion, which teach nothing."""

    @property
    def sha256(self) -> str:
        """Of the content, once it is read."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Record]:
        """Read the records that have a completion.

        Raises:
            DataError: The file is missing, cannot be read or parsed, or a record lacks its keys;
                the message names the place.
        """
        is_lines = self._url.rsplit("?", 1)[0].endswith((".jsonl", ".ndjson"))
        count = 0
        for number, item in enumerate(self._lines() if is_lines else self._elements()):
            record = _record(self._url, number, item)
            count += 1
            if record.completion:
                yield record
            else:
                self.num_skipped += 1
        if not count:
            raise DataError(f"{self._url} holds no records. Give a file with at least one.")
        if count == self.num_skipped:
            raise DataError(f"{self._url}: all {count} records have an empty completion.")

    def _lines(self) -> Iterator[Any]:
        with opened(self._url) as file:
            number = 0
            while line := _reading(self._url, file.readline):
                number += 1
                self._saw(line)
                if line.strip():
                    yield _json(self._url, line.rstrip(b"\n"), number)

    def _elements(self) -> Iterator[Any]:
        with opened(self._url) as file:

            def read(num_bytes: int) -> bytes:
                raw: bytes = _reading(self._url, lambda: file.read(num_bytes))
                self._saw(raw)
                return raw

            try:
                yield from elements(read)
            except BrokenJsonError as error:
                raise _not_json(self._url, error, error.line, error.column) from error
            except UnicodeDecodeError as error:
                raise _not_text(self._url, error) from error
            except NoListError as error:
                raise DataError(
                    f"{self._url} is JSON, but neither a list of records nor an object with a list "
                    'in "data".'
                ) from error

    def _saw(self, raw: bytes) -> None:
        self._hash.update(raw)
        self._num_read += len(raw)
        self._on_read(self._num_read)


def identity(url: str) -> dict[str, Any] | None:
    """Return what tells this content of a place from another one; None: nothing does.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    fs, path = _reading(url, lambda: fsspec.url_to_fs(url))
    info = _reading(url, lambda: fs.info(path))
    known = {name: str(info[name]) for name in _IDENTIFYING if info.get(name)}
    return {"url": fs.unstrip_protocol(path), "size": info.get("size"), **known} if known else None


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """Open a file at any URL.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    with ExitStack() as stack:
        yield _reading(url, lambda: stack.enter_context(fsspec.open(url, "rb")))


def _reading(url: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"--dataset {url}: there is no such file. Check the path.") from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"--dataset {url} cannot be read: {error}. Check the URL.") from error


def _json(url: str, raw: bytes, line: int) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise _not_json(url, error.msg, line, error.colno) from error
    except UnicodeDecodeError as error:
        raise _not_text(url, error) from error
    except (ValueError, RecursionError) as error:  # a huge number, a bottomless value
        raise _not_json(url, error, line, 1) from error


def _not_json(url: str, reason: object, line: int, column: int) -> DataError:
    return DataError(
        f"{url}, line {line}, column {column}: this is not JSON ({reason}). Mend the file; files "
        "with one record a line are named .jsonl."
    )


def _not_text(url: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{url}: byte {error.start} is not UTF-8 text.")


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
