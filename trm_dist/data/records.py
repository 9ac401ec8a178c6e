"""Text records from JSON and JSONL, local or at any fsspec URL.

Accepted: a list of records, `{"metadata": ..., "data": [...]}`, or one record a line (.jsonl,
.ndjson).
"""

import errno
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from typing import Any, TypeVar

from trm_dist.data.codec import Encoded, encode
from trm_dist.data.encoders import answers, encode_lines
from trm_dist.data.json_stream import BrokenJsonError, NoListError, elements
from trm_dist.data.parse import as_record, not_json, not_text
from trm_dist.errors import DataError

_BLOCK_BYTES = 1 << 20
"""Of lines that are parsed at a time."""
_PART = 1 << 20
"""Positions that are encoded at a time; a short record has as many as a long one."""

Item = TypeVar("Item")

_IDENTIFYING = ("ETag", "etag", "mtime", "created", "LastModified", "ino", "generation", "version")
"""What file systems say of a file that changes with its content."""


class RecordFile:
    """The records of a file, part after part; it is never in memory as a whole.

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
        self._num_read = self._num_records = 0
        self.num_skipped = 0
        """Records with an empty completion, which teach nothing."""

    @property
    def sha256(self) -> str:
        """Of the content, once it is read."""
        return self._hash.hexdigest()

    def encoded(self, seq_len: int, num_helpers: int = 0) -> Generator[Encoded]:
        """Read and encode the records that have a completion, part after part.

        Args:
            seq_len: L.
            num_helpers: Processes that encode lines beside this one.

        Raises:
            DataError: The file is missing, cannot be read or parsed, or a record lacks its keys;
                the message names the place.
        """
        is_lines = self._url.rsplit("?", 1)[0].endswith((".jsonl", ".ndjson"))
        yield from self._of_lines(seq_len, num_helpers) if is_lines else self._of_list(seq_len)
        if not self._num_records:
            raise DataError(f"{self._url} holds no records. Give a file with at least one.")
        if self._num_records == self.num_skipped:
            raise DataError(
                f"{self._url}: all {self._num_records} records have an empty completion."
            )

    def _of_lines(self, seq_len: int, num_helpers: int) -> Iterator[Encoded]:
        num_lines = 0
        parts = (part for block in self._blocks() for part in _cut(block, _most(seq_len)))
        with closing(answers(parts, seq_len, num_helpers)) as blocks:
            for block, answer in blocks:
                found = answer or encode_lines(
                    self._url, block, seq_len, first_line=num_lines, first_record=self._num_records
                )
                num_lines += found.num_lines
                yield self._counted(found.encoded, found.num_records)

    def _of_list(self, seq_len: int) -> Iterator[Encoded]:
        elements = enumerate(self._elements())
        for part in batched(elements, _most(seq_len)):
            records = [as_record(self._url, number, item) for number, item in part]
            teaching = [each for each in records if each.completion]
            yield self._counted(encode(teaching, seq_len), len(records))

    def _counted(self, encoded: Encoded, num_records: int) -> Encoded:
        self._num_records += num_records
        self.num_skipped += num_records - len(encoded.is_cut)
        return encoded

    def _blocks(self) -> Iterator[bytes]:
        """Read whole lines, about a block of them at a time."""
        with opened(self._url) as file:
            pieces: list[bytes] = []
            while raw := _reading(self._url, lambda: file.read(_BLOCK_BYTES)):
                self._saw(raw)
                lines, newline, rest = raw.rpartition(b"\n")
                if newline:
                    yield b"".join([*pieces, lines, newline])
                    pieces.clear()
                pieces.append(rest)
            if any(pieces):
                yield b"".join(pieces)

    def _elements(self) -> Iterator[Any]:
        with opened(self._url) as file:

            def read(num_bytes: int) -> bytes:
                raw: bytes = _reading(self._url, lambda: file.read(num_bytes))
                self._saw(raw)
                return raw

            try:
                yield from elements(read)
            except BrokenJsonError as error:
                raise not_json(self._url, error, error.line, error.column) from error
            except UnicodeDecodeError as error:
                raise not_text(self._url, error) from error
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
    fs, path = _reading(url, lambda: _fsspec().url_to_fs(url))
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
        yield _reading(url, lambda: stack.enter_context(_fsspec().open(url, "rb")))


def _most(seq_len: int) -> int:
    """Return how many records are encoded at a time."""
    return max(1, _PART // seq_len)


def _cut(lines: bytes, most: int) -> Iterator[bytes]:
    """Yield lines, so many at a time at most."""
    if lines.count(b"\n") <= most:
        yield lines
        return
    for part in batched(lines.removesuffix(b"\n").split(b"\n"), most):
        yield b"\n".join([*part, b""])


def _fsspec() -> Any:
    """Import what puzzles from a seed do without."""
    import fsspec

    return fsspec


def _reading(url: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"--dataset {url}: there is no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise DataError(
            f"--dataset {url} cannot be read: it is a directory without dataset.json. Give a file."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"--dataset {url} cannot be read: {error}. Check the URL.") from error
    except Exception as error:  # noqa: BLE001 each file system has errors of its own
        is_refused = "Credentials" in type(error).__name__
        cause = OSError(errno.EACCES if is_refused else errno.EIO, str(error))
        raise DataError(
            f"--dataset {url} cannot be read: {error}. Check the URL and its credentials."
        ) from cause


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
