"""Text as bytes, bytes as tokens: 256 of them, every language, no download.

A model of fixed length maps a question to an answer. The question is context, separator, query; the
answer is the completion and an end. Both are UTF-8 bytes; three control bytes that do not occur in
text serve as marks, and are replaced by a space where they do occur.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_TOKENS = 256
PAD = 0x00
END = 0x03
SEPARATOR = 0x1E
IGNORED = -100
"""Label of a position that counts nowhere."""

_CLEANED = bytes.maketrans(bytes([PAD, END, SEPARATOR]), b"   ")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as arrays of one length, and whether anything was cut to get there."""

    inputs: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int16]
    is_cut: bool


def encode(context: str, query: str, completion: str, seq_len: int) -> Encoded:
    """Encode a record into `seq_len` positions.

    What is too long loses the start of its context first, then of its query, and the end of its
    completion: what stands nearest to the answer stays.
    """
    asked = _to_bytes(query)
    if context:
        asked = _to_bytes(context) + bytes([SEPARATOR]) + asked
    answer = _to_bytes(completion) + bytes([END])
    inputs = np.full(seq_len, PAD, dtype=np.uint8)
    labels = np.full(seq_len, IGNORED, dtype=np.int16)
    kept, said = asked[-seq_len:], answer[:seq_len]
    inputs[: len(kept)] = np.frombuffer(kept, dtype=np.uint8)
    labels[: len(said)] = np.frombuffer(said, dtype=np.uint8)
    return Encoded(inputs, labels, len(asked) > seq_len or len(answer) > seq_len)


def decode(tokens: npt.ArrayLike) -> str:
    """Return the text up to the end mark; bytes that are no UTF-8 become replacement characters."""
    text = np.asarray(tokens).astype(np.uint8).tobytes()
    return text.split(bytes([END]), 1)[0].rstrip(bytes([PAD])).decode("utf-8", "replace")


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace").translate(_CLEANED)
