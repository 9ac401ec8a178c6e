"""Event files for TensorBoard: what is new in the curves of a snapshot, written at its commit.

An event file is never appended to, as an object in S3 cannot be: each commit writes one of its own
for each series, named by its first batch count, whole and in one step like everything here. A
record says how far each series is written. It comes after the file, so a writer that is killed in
between leaves a file that the next one writes once more, under the same name; and a batch that was
written, lost with every memory and trained again is not written twice.

The format is that of TensorFlow's TFRecord files of Event messages. Ours is written here, as
packages that could do it import torch, which has no place in the persister.

Source: tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto, summary.proto.
"""

import ctypes
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trm_dist.checkpoint.archive import KIND
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.store import HIDDEN, Guard, Store, unguarded

FOLDER = f"{HIDDEN}/tensorboard"
"""What TensorBoard is given as its --logdir."""

CURVES = "curves"
"""Key of a snapshot's tree."""

_CRC32C = 0x82F63B78
"""The polynomial, its bits reversed."""


@dataclass(frozen=True, slots=True)
class Points:
    """A series as a snapshot holds it."""

    tags: Sequence[str]
    rows: "memoryview[float]"
    """float64, flat: batch count (0: none), seconds since the epoch, a value for each tag."""

    def after(self, batch_count: int) -> list[list[float]]:
        """Return the rows behind a batch count in their order."""
        width = 2 + len(self.tags)
        starts = [
            number * width
            for number, count in enumerate(self.rows[::width].tolist())
            if count > batch_count
        ]
        return sorted(list(self.rows[start : start + width]) for start in starts)


class EventFiles:
    """The event files of one branch of a run, written by its writer."""

    def __init__(self, store: Store, run: Run, guard: Guard = unguarded) -> None:
        """Name them; nothing is read yet.

        Args:
            store: Where the checkpoints lie.
            run: Whose they are.
            guard: Asked before anything becomes visible; raises when it must not.
        """
        self._store, self._guard = store, guard
        self.folder = f"{FOLDER}/{run.run_id[:8]}-{run.branch}"

    def write(self, header: bytes, body: memoryview) -> None:
        """Write what is new in a snapshot; one without curves has nothing.

        Raises:
            OSError: The store failed; what is missing is written with a later snapshot.
            FencedError: Another writer has taken over.
        """
        found = curves_of(header, body)
        written = self._read_record() if found else {}
        for series, points in found.items():
            rows = points.after(int(written.get(series, 0)))
            if rows:
                name = f"{self.folder}/{series}/events.out.tfevents.{int(rows[0][0]):012d}"
                self._store.put(name, [encode(points.tags, rows)], self._guard)
                written[series] = int(rows[-1][0])
                self._store.put(self._record, [json.dumps(written).encode()], self._guard)

    @property
    def _record(self) -> str:
        return f"{self.folder}/written.json"

    def _read_record(self) -> dict[str, int]:
        try:
            found = json.loads(bytes(self._store.read(self._record)))
        except (FileNotFoundError, ValueError):  # one that is damaged: all points once more
            return {}
        return dict(found) if isinstance(found, dict) else {}


def curves_of(header: bytes, body: memoryview) -> dict[str, Points]:
    """Return the series of a snapshot by name; their rows are views of its body."""
    content = json.loads(header)
    curves = _items(content["tree"]).get(CURVES)
    if curves is None:
        return {}
    found = {}
    for name, series in _items(curves).items():
        (length, width), offset = content["tensors"][_items(series)["points"]["at"]][1:]
        rows = body[offset : offset + 8 * length * width].cast("d")
        found[name] = Points(_items(series)["tags"]["items"], rows)
    return found


def _items(node: dict[str, Any]) -> dict[str, Any]:
    assert node[KIND] == "dict", "of a dict"
    return dict(node["items"])


# -- the format ------------------------------------------------------------------------------------


def encode(tags: Sequence[str], rows: Iterable[Sequence[float]]) -> bytes:
    """Return an event file.

    Args:
        tags: Names of the values.
        rows: Batch count, seconds since the epoch, a value for each tag.
    """
    events = [_event(0.0, 0, _field(3, b"brain.Event:2"))]
    for batch_count, at_s, *values in rows:
        summary = b"".join(
            # ctypes makes infinity of what is too large, where struct refuses it.
            _field(1, _field(1, tag.encode()) + b"\x15" + bytes(ctypes.c_float(value)))
            for tag, value in zip(tags, values, strict=True)
        )
        events.append(_event(at_s, int(batch_count), _field(5, summary)))
    return b"".join(map(_record, events))


def _event(at_s: float, step: int, what: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", at_s) + b"\x10" + _varint(step) + what


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a message that has a length."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_CRC32C if value & 1 else 0)
    return value


_TABLE = [_table_entry(value) for value in range(256)]
