"""Lines of records encoded by processes beside this one, for files that keep one busy for long.

A helper takes a block of lines from its standard input and answers with arrays on its standard
output, until the pipe ends, however that came about. It answers what it could do, and nothing else:
a block with an error in it, and one whose helper was killed, is left to the caller, who then does
it as if there were no helpers. So there is one place that tells errors, and nothing to repair.
"""

import fcntl
import gc
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import IO

import numpy as np

from trm_dist.data.codec import Encoded, encode
from trm_dist.data.parse import parse_lines
from trm_dist.errors import DataError

MOST = 8
"""Helpers; one process that reads, hashes and writes cannot feed more."""
WORTH_BYTES = 32 << 20
"""A smaller file is encoded before they have started."""

_ENVIRONMENT = {
    # There are many, and each has as many idle threads of its mathematics as there are cores.
    "OMP_NUM_THREADS": "1",
    # What one block took is for the next: the kernel would have to clear it again.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
_PIPE_BYTES = 1 << 20
"""The most that everybody may have; less means more switches from one process to another."""

_SIZE = struct.Struct("<q")
_ANSWER = struct.Struct("<?qqq")
"""Whether it could be done; records, lines, and rows of the arrays that follow."""


@dataclass(frozen=True, slots=True)
class EncodedLines:
    """What has become of some lines."""

    encoded: Encoded
    num_records: int
    """Those without a completion included, which are not encoded."""
    num_lines: int


def encode_lines(
    url: str, raw: bytes, seq_len: int, *, first_line: int = 0, first_record: int = 0
) -> EncodedLines:
    """Encode the records of whole lines.

    Args:
        url: Of the file, for messages.
        raw: The lines.
        seq_len: L.
        first_line: How many lines of the file come before, for messages.
        first_record: How many records do.

    Raises:
        DataError: A line is not JSON, or not a record; the message names the place.
    """
    lines = parse_lines(url, raw, first_line, first_record)
    return EncodedLines(encode(lines.records, seq_len), lines.num_records, lines.num_lines)


def worthwhile(num_bytes: int | None) -> int:
    """Return how many helpers a file of this size deserves on this machine."""
    cores = _num_cores()
    return min(cores, MOST) if cores > 1 and (num_bytes or 0) >= WORTH_BYTES else 0


def _num_cores(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return how many cores are there for this process; a container's limit may be lower."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError), open(limit, encoding="utf-8") as file:
        quota, period = map(int, file.read().split())  # "max" where there is none
        return max(1, min(cores, quota // period))
    return cores


def answers(
    blocks: Iterable[bytes], seq_len: int, num_helpers: int
) -> Generator[tuple[bytes, EncodedLines | None]]:
    """Yield each block with what the helpers have made of it, in order.

    Args:
        blocks: Whole lines each.
        seq_len: L.
        num_helpers: How many there are.

    Yields:
        The block; and None if it could not be done, for whatever reason.
    """
    if not num_helpers:
        yield from ((block, None) for block in blocks)
        return
    with ExitStack() as stack:
        helpers = _Helpers(seq_len, num_helpers)
        stack.callback(helpers.close)
        pool = ThreadPoolExecutor(num_helpers, "encoder")
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[tuple[bytes, Future[EncodedLines | None]]] = deque()
        for block in blocks:
            waiting.append((block, pool.submit(helpers.ask, block)))
            if len(waiting) > num_helpers + 1:  # each has one, and the next is at hand
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(
    block: bytes, future: "Future[EncodedLines | None]"
) -> tuple[bytes, EncodedLines | None]:
    return block, future.result()


class _Helpers:
    """Processes of which each does one block at a time."""

    def __init__(self, seq_len: int, count: int) -> None:
        self._idle: SimpleQueue[_Helper] = SimpleQueue()
        self._all = [_Helper(seq_len) for _ in range(count)]
        for each in self._all:
            self._idle.put(each)

    def ask(self, block: bytes) -> EncodedLines | None:
        """Have a block done by the next one that is free."""
        helper = self._idle.get()
        try:
            return helper.ask(block)
        finally:
            self._idle.put(helper)

    def close(self) -> None:
        """End them all."""
        for each in self._all:
            each.close()


class _Helper:
    """One process, which is started when it is needed, and anew after its end."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, block: bytes) -> EncodedLines | None:
        """Have a block done; None: it could not be."""
        with suppress(OSError, EOFError):
            process = self._process = self._process or self._start()
            assert process.stdin is not None, "a pipe"
            assert process.stdout is not None, "a pipe"
            process.stdin.write(_SIZE.pack(len(block)))
            process.stdin.write(block)
            process.stdin.flush()
            head = _take(process.stdout, _ANSWER.size)
            is_done, num_records, num_lines, num_rows = _ANSWER.unpack(head)
            if not is_done:
                return None
            return EncodedLines(self._arrays(process.stdout, num_rows), num_records, num_lines)
        self.close()
        return None

    def close(self) -> None:
        """End it; it has nothing to lose."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(  # noqa: S603 our own module
            [sys.executable, "-m", "trm_dist.data.encoders", str(self._seq_len)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # Ctrl+C ends who asks, and so the pipe
        )  # fmt: skip
        for pipe in filter(None, (process.stdin, process.stdout)):
            with suppress(OSError):  # all pipes of a user have a limit as well
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return process

    def _arrays(self, source: IO[bytes], num_rows: int) -> Encoded:
        shape = num_rows, self._seq_len
        num_bytes = num_rows * self._seq_len
        return Encoded(
            np.frombuffer(_take(source, num_bytes), np.uint8).reshape(shape),
            np.frombuffer(_take(source, num_bytes), np.uint8).reshape(shape),
            np.frombuffer(_take(source, num_rows), np.bool_),
        )


def _take(source: IO[bytes], num_bytes: int) -> bytes:
    raw = source.read(num_bytes)
    if len(raw) != num_bytes:
        raise EOFError
    return raw


def _fastest() -> Callable[[bytes, int], EncodedLines]:
    """Return what encodes lines: pyarrow's parser first, where it works."""
    try:
        from trm_dist.data.columns import encode_plain
    except Exception:  # noqa: BLE001 whatever is wrong with it, it is not needed
        return partial(encode_lines, "")

    def encode_block(raw: bytes, seq_len: int) -> EncodedLines:
        if plain := encode_plain(raw, seq_len):
            encoded, num_lines = plain
            return EncodedLines(encoded, num_lines, num_lines)
        return encode_lines("", raw, seq_len)

    return encode_block


def main() -> None:
    """Encode blocks until there are no more."""
    gc.disable()  # nothing here refers to itself
    encode_block = _fastest()
    seq_len = int(sys.argv[1])
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, BrokenPipeError):
        while True:
            block = _take(source, *_SIZE.unpack(_take(source, _SIZE.size)))
            try:
                found = encode_block(block, seq_len)
            except DataError:
                sink.write(_ANSWER.pack(False, 0, 0, 0))
            else:
                arrays = found.encoded
                counts = found.num_records, found.num_lines, len(arrays.is_cut)
                sink.write(_ANSWER.pack(True, *counts))
                for each in (arrays.inputs, arrays.labels, arrays.is_cut):
                    sink.write(each.tobytes())
            sink.flush()


if __name__ == "__main__":
    main()
