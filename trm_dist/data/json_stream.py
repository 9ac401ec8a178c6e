"""The elements of a JSON list one after the other, so that memory does not grow with the file.

Python's own decoder does the work, on a window of the text: where a value is cut by the window's
end, the window grows and the value is decoded again. It doubles each time, so that a value of any
length is looked at twice on average. What stands beside the list is decoded as a whole.
"""

import codecs
import json
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any

_WINDOW = 1 << 20
_DECODER = json.JSONDecoder()
_LONGEST_WORD = len("-Infinity")
_NUMBER_PARTS = re.compile(r"[-+.eE0-9]*")
"""If nothing else follows a value in the window, it may be a number that goes on after it."""
_BLANKS = re.compile(r"[ \t\n\r]*")


class BrokenJsonError(ValueError):
    """The text is not JSON."""

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(reason)
        self.line, self.column = line, column
        """Where, both counted from 1."""


class NoListError(ValueError):
    """The text is JSON, but neither a list nor an object with a list in "data"."""


def elements(read: Callable[[int], bytes]) -> Iterator[Any]:
    """Yield the elements of a list, or of the list that an object has in "data".

    Args:
        read: Returns up to so many bytes of the text, and none at its end.

    Raises:
        BrokenJsonError: The text is not JSON; what comes before has been yielded.
        NoListError: There is no such list.
        UnicodeDecodeError: Its `start` is the place of the wrong byte in the whole text.
    """
    text = _Text(read)
    if text.take("["):
        has_list = True
        yield from _list(text)
    elif text.take("{"):
        has_list = yield from _object(text)
    else:
        has_list = False
        text.value()
    if text.peek():
        raise text.broken("Extra data")
    if not has_list:
        raise NoListError


def _list(text: "_Text") -> Iterator[Any]:
    if text.take("]"):
        return
    yield text.value()
    while not text.take("]"):
        text.expect(",")
        yield text.value()


def _object(text: "_Text") -> Generator[Any, None, bool]:
    """Yield the elements of the list in "data", and tell whether there is one."""
    if text.take("}"):
        return False
    has_list = False
    while True:
        if text.peek() != '"':
            raise text.broken("Expecting property name enclosed in double quotes")
        key = text.value()
        text.expect(":")
        if key == "data" and text.take("["):
            has_list = True
            yield from _list(text)
        else:
            text.value()
        if text.take("}"):
            return has_list
        text.expect(",")


class _Text:
    """A window on a text, which grows at its end and forgets what was taken from it."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decoder: codecs.IncrementalDecoder | None = None
        self._num_bytes = 0
        self._window, self._at, self._is_end = "", 0, False
        self._line, self._column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            self._at = _BLANKS.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window) or self._is_end:
                return self._window[self._at : self._at + 1]
            self._grow()

    def take(self, symbol: str) -> bool:
        """Tell whether a character comes next, and go past it."""
        is_next = self.peek() == symbol
        self._at += is_next
        return is_next

    def expect(self, symbol: str) -> None:
        """Go past a character that must come next."""
        if not self.take(symbol):
            raise self.broken(f"Expecting {symbol!r} delimiter")

    def value(self) -> Any:
        """Decode the value that comes next, and go past it."""
        while True:
            self.peek()
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if self._is_end or not self._may_be_cut(error):
                    raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a huge number, a bottomless value
                raise self.broken(str(error)) from error
            else:
                if self._is_end or not _NUMBER_PARTS.fullmatch(self._window, end):
                    self._at = end
                    return value
            self._grow()

    def broken(self, reason: str, at: int | None = None) -> BrokenJsonError:
        """Return the error that names a place of the window, the present one by default."""
        return BrokenJsonError(reason, *self._place(self._at if at is None else at))

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Tell whether an error may only be that the value goes on after the window."""
        is_near_end = len(self._window) - error.pos < _LONGEST_WORD
        return is_near_end or error.msg.startswith("Unterminated string")

    def _place(self, at: int) -> tuple[int, int]:
        """Return line and column of a place of the window."""
        newline = self._window.rfind("\n", 0, at)
        if newline < 0:
            return self._line, self._column + at
        return self._line + self._window.count("\n", 0, at), at - newline

    def _grow(self) -> None:
        """Forget what was taken, and read as much again as is left, or more."""
        self._line, self._column = self._place(self._at)
        self._window = self._window[self._at :]
        self._at = 0
        raw = self._read(max(_WINDOW, len(self._window)))
        self._is_end = not raw
        self._window += self._decoded(raw)

    def _decoded(self, raw: bytes) -> str:
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder(json.detect_encoding(raw))("surrogatepass")
        pending = self._decoder.getstate()[0]
        try:
            decoded = self._decoder.decode(raw, final=self._is_end)
        except UnicodeDecodeError as error:
            error.start += self._num_bytes - len(pending)
            raise
        self._num_bytes += len(raw)
        return decoded
