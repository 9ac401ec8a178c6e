"""Transfers to and from S3, cut into parts of which a few are on their way at a time."""

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TypeVar

import botocore.exceptions as failures  # type: ignore[import-untyped]

from trm_dist.checkpoint.s3_requests import Answer, RefusedError

PARALLEL = 4
REPORT_EVERY_S = 5.0

_MOST_PARTS = 10_000
_BLOCK_BYTES = 1 << 20

Span = tuple[int, int]
"""First byte, and the first one after the last."""

T = TypeVar("T")


def in_parallel(
    work: Callable[[int, threading.Event], T], count: int, report: Callable[[], None] | None = None
) -> list[T]:
    """Do pieces of work in a few threads, of which none is left when this ends.

    Args:
        work: Gets the number of a piece, and what is set once another piece has failed.
        count: How many there are.
        report: Called now and then while they are worked on.
    """
    pool = ThreadPoolExecutor(PARALLEL, "s3")
    stop = threading.Event()
    try:
        futures = [pool.submit(work, index, stop) for index in range(count)]
        while True:
            done, pending = wait(futures, REPORT_EVERY_S, FIRST_EXCEPTION)
            for each in done:
                each.result()
            if not pending:
                return [each.result() for each in futures]
            if report:
                report()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def spans(start: int, end: int, num_bytes: int) -> list[Span]:
    """Cut a range into parts of this size, or larger where a server would find them too many."""
    num_bytes = max(num_bytes, -(-(end - start) // _MOST_PARTS))
    return [(first, min(first + num_bytes, end)) for first in range(start, end, num_bytes)]


def cut(views: Sequence[memoryview], span: Span) -> bytearray:
    """Return a part of some pieces, as if they were one.

    botocore sends a bytearray as it lies in memory; bytes it would read as a file, block by block,
    and first ask the server whether it wants them.
    """
    first, end = span
    inside, position = [], 0
    for view in views:
        inside.append(view[max(0, first - position) : max(0, end - position)])
        position += len(view)
    return bytearray().join(inside)


def header(span: Span) -> str:
    """Return a span as HTTP has it."""
    return f"bytes={span[0]}-{span[1] - 1}"


def place(answer: Answer) -> tuple[int, int]:
    """Return where the body of an answer begins in its object, and the size of that."""
    if "ContentRange" not in answer:
        return 0, int(answer["ContentLength"])
    span, _, size = answer["ContentRange"].removeprefix("bytes ").partition("/")
    return int(span.partition("-")[0]), int(size)


def discard(answer: Answer) -> Answer:
    """Take an answer without its body; one that is short costs less than its connection."""
    with closing(answer["Body"]) as body:
        if answer["ContentLength"] <= _BLOCK_BYTES:
            body.read()
    return answer


def take_head(most: int, answer: Answer) -> tuple[bytes, Answer]:
    """Read the beginning of a body."""
    wanted = min(most, answer["ContentLength"])
    with closing(answer["Body"]) as body:
        head = body.read(wanted)
    if len(head) != wanted:
        raise failures.IncompleteReadError(actual_bytes=len(head), expected_bytes=wanted)
    return head, answer


class Window:
    """Memory for a part of one version of an object."""

    def __init__(self, view: memoryview, first: int, size: int, tag: str) -> None:
        self.filled = 0
        self._view, self._first, self._size, self._tag = view, first, size, tag

    def take(self, answer: Answer) -> None:
        """Read a body into it, all of it and of this version."""
        self.filled = 0
        with closing(answer["Body"]) as body:
            # Servers that do not know If-Match or Range go by the rules without them.
            if answer["ETag"] != self._tag:
                raise RefusedError(errno.ESTALE, "replaced while it was read")
            check_place(answer, (self._first, self._size))
            while self.filled < len(self._view):
                num_bytes = body.readinto(self._view[self.filled : self.filled + _BLOCK_BYTES])
                if not num_bytes:
                    raise failures.IncompleteReadError(
                        actual_bytes=self.filled, expected_bytes=len(self._view)
                    )
                self.filled += num_bytes


def check_place(answer: Answer, expected: tuple[int, int]) -> None:
    """Raise unless a body begins where it was asked to, in an object of the size it had."""
    if place(answer) != expected:
        text = f"asked for bytes from {expected[0]} of {expected[1]}, got {place(answer)}"
        raise OSError(errno.EIO, text)
