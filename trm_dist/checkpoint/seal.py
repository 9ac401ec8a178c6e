"""The seal of a checkpoint: who it is and a digest of all its bytes, in the zip's archive comment.

A .pt file is a zip whose CRC-32s leave about 5 % of the bytes uncovered, and `torch.load` checks
none of them. So the archive comment ends the file with

    trm_dist {"batch_count": ..., "branch": ..., ...} xxh3-128:<32 hex digits>

and the digest covers every byte before the digits except the zip's two-byte comment length, which
could not be known before. `torch.load`, Python's zipfile and unzip read such a file as any other.
The summary tells where the checkpoint stands in its run without reading weights: a listing reads
the last bytes of each file. xxh3-128, because sha256 costs ten times a raw read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from trm_dist.errors import CorruptCheckpointError

MAX_COMMENT_BYTES = 4096
"""The seal lies within this many bytes of the end of a file."""

Piece = bytes | memoryview

_MARK = b"trm_dist "
_DIGEST_MARK = b" xxh3-128:"
_DIGEST_DIGITS = 32
_END_RECORD = b"PK\x05\x06"
_END_RECORD_BYTES = 22


@dataclass(frozen=True, slots=True)
class Seal:
    """What the end of a checkpoint says of it."""

    summary: dict[str, Any]
    """Run, branch and counters."""
    digest: str
    """Hex digits of the digest; not verified by reading them."""


def seal(pieces: Sequence[Piece], summary: dict[str, Any]) -> list[Piece]:
    """Append the seal to a finished zip archive, without a copy.

    Args:
        pieces: The bytes of a zip archive without a comment, in their order.
        summary: Plain values, a few hundred bytes as JSON.
    """
    prefix = _MARK + json.dumps(summary, sort_keys=True).encode() + _DIGEST_MARK
    size = len(prefix) + _DIGEST_DIGITS
    assert size <= MAX_COMMENT_BYTES - _END_RECORD_BYTES, "the summary is meant to be short"
    end = pieces[-1]
    assert end[-_END_RECORD_BYTES:-18] == _END_RECORD, "a zip without a comment ends like this"
    body = [*pieces[:-1], end[:-2]]
    return [*body, size.to_bytes(2, "little") + prefix + _digest(*body, prefix)]


def read_seal(tail: bytes | memoryview) -> Seal:
    """Read the seal from the end of a file; nothing is verified.

    Args:
        tail: The last bytes of the file, MAX_COMMENT_BYTES of them or the whole file.

    Raises:
        CorruptCheckpointError: There is no readable seal.
    """
    end = bytes(tail[-MAX_COMMENT_BYTES:])
    start = end.rfind(_MARK)
    if start < 2 or end[-_DIGEST_DIGITS - len(_DIGEST_MARK) : -_DIGEST_DIGITS] != _DIGEST_MARK:
        raise CorruptCheckpointError("it does not end with the seal of a trm_dist checkpoint")
    try:
        summary = json.loads(end[start + len(_MARK) : -_DIGEST_DIGITS - len(_DIGEST_MARK)])
    except ValueError as error:
        raise CorruptCheckpointError("its seal cannot be read") from error
    if not isinstance(summary, dict):
        raise CorruptCheckpointError("its seal cannot be read")
    return Seal(summary, end[-_DIGEST_DIGITS:].decode("ascii", "replace"))


def verify_seal(data: bytes | memoryview) -> Seal:
    """Verify every byte of a checkpoint against its digest.

    Raises:
        CorruptCheckpointError: There is no seal, or a byte differs from what was written.
    """
    found = read_seal(data)
    view = memoryview(data)
    start = len(data) - MAX_COMMENT_BYTES + bytes(data[-MAX_COMMENT_BYTES:]).rfind(_MARK)
    if len(data) < MAX_COMMENT_BYTES:
        start = bytes(data).rfind(_MARK)
    prefix = bytes(view[start:-_DIGEST_DIGITS])
    length = int.from_bytes(view[start - 2 : start], "little")
    if length != len(prefix) + _DIGEST_DIGITS:
        raise CorruptCheckpointError("the length of its seal is wrong")
    if _digest(view[: start - 2], prefix).decode() != found.digest:
        raise CorruptCheckpointError("its bytes do not match its digest")
    return found


def _digest(*pieces: Piece) -> bytes:
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest().encode()
