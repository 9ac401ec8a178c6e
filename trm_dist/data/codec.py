"""Text as bytes, bytes as tokens: 256 of them, every language, no download.

A model of fixed length maps a question to an answer. The question is context, separator, query; the
answer is the completion and an end. Both are UTF-8 bytes; three control bytes that do not occur in
text serve as marks, and are replaced by a space where they do occur.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_TOKENS = 256
PAD = 0x00
END = 0x03
SEPARATOR = 0x1E
_SEPARATOR, _END = bytes([SEPARATOR]), bytes([END])
_CLEANED = bytes.maketrans(bytes([PAD, END, SEPARATOR]), b"   ")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Records as arrays. N records, L positions."""

    inputs: npt.NDArray[np.uint8]
    """Tokens of the questions, [N, L]."""
    labels: npt.NDArray[np.uint8]
    """Tokens of the answers, [N, L]; PAD, which counts nowhere, behind them."""
    is_cut: npt.NDArray[np.bool_]
    """Whether anything was cut to get there, [N]."""


def encode(records: Iterable[tuple[str, str, str]], seq_len: int) -> Encoded:
    """Encode records into `seq_len` positions each.

    What is too long loses the start of its context first, then of its query, and the end of its
    completion: what stands nearest to the answer stays.

    Args:
        records: Context, query and completion of each.
        seq_len: L.
    """
    # A character has a byte at least, so one more than fit shows as well that it is cut.
    cut = (
        (
            _to_bytes(context[-seq_len - 1 :]),
            _to_bytes(query[-seq_len - 1 :]),
            _to_bytes(completion[: seq_len + 1]),
        )
        for context, query, completion in records
    )
    return pack(cut, seq_len)


def pack(records: Iterable[tuple[bytes, bytes, bytes]], seq_len: int) -> Encoded:
    """Mark the bytes of records, without marks so far, and lay them into `seq_len` positions."""
    questions, answers = [], []
    for context, query, completion in records:
        questions.append(context + _SEPARATOR + query if context else query)
        answers.append(completion + _END)
    asked_lengths, lengths = (
        np.fromiter(map(len, each), np.int64) for each in (questions, answers)
    )
    return Encoded(
        _rows([each[-seq_len:] for each in questions], seq_len),
        _rows([each[:seq_len] for each in answers], seq_len),
        np.maximum(asked_lengths, lengths) > seq_len,
    )


def decode(tokens: npt.ArrayLike) -> str:
    """Return the text up to the end mark; bytes that are no UTF-8 become replacement characters."""
    text = np.asarray(tokens).astype(np.uint8).tobytes()
    return text.split(bytes([END]), 1)[0].rstrip(bytes([PAD])).decode("utf-8", "replace")


def _rows(texts: Iterable[bytes], seq_len: int) -> npt.NDArray[np.uint8]:
    """Return texts of at most L bytes, filled up, as [N, L]."""
    joined = b"".join(text.ljust(seq_len, bytes([PAD])) for text in texts)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, seq_len)


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace").translate(_CLEANED)
