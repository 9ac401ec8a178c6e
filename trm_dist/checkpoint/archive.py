"""The checkpoint file: torch's zip archive, written from a snapshot without torch or a copy.

A snapshot is a header (the tree as JSON, a number in the place of each tensor) and a flat buffer.
The file is a list of pieces around views of that buffer, so a process that never imports torch
writes it from shared memory straight to the store. A bare `torch.load(path)` reads it: the records
are those of `torch.save`, which the tests compare it with.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from typing import Any

from isal import isal_zlib

from trm_dist.checkpoint.seal import seal
from trm_dist.progress import COUNTERS

KIND = "$"
"""Key of the skeleton's nodes that says which container or tensor a node stands for."""

STORAGES = {
    "torch.float64": ("DoubleStorage", 8), "torch.float32": ("FloatStorage", 4),
    "torch.bfloat16": ("BFloat16Storage", 2), "torch.float16": ("HalfStorage", 2),
    "torch.int64": ("LongStorage", 8), "torch.int32": ("IntStorage", 4),
    "torch.int16": ("ShortStorage", 2), "torch.int8": ("CharStorage", 1),
    "torch.uint8": ("ByteStorage", 1), "torch.bool": ("BoolStorage", 1),
}  # fmt: skip
"""Types of tensors a snapshot holds: the name of torch's storage class, bytes an element."""

_FOLDER = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_OWNER_ONLY = 0o600 << 16  # as zipfile gives out a record that is no file
_PADDING_ID = 0x4246  # the one torch uses
_SEALED_FROM_RUN = ("run_id", "branch", "origin", "created_at", "launch_id", "origin_url")


def encode(
    header: bytes, buffer: memoryview, summary: dict[str, Any] | None = None
) -> tuple[list[bytes | memoryview], dict[str, Any]]:
    """Return a sealed checkpoint as pieces in their order, and the summary in its seal.

    Args:
        header: Of a snapshot.
        buffer: Its bytes; the pieces are views of it, so it must not change while they are used.
        summary: What the seal says; left out, the counters and the run the tree holds.
    """
    content = json.loads(header)
    archive = _Pieces()
    with zipfile.ZipFile(archive, "w") as file:
        _add(file, archive, "data.pkl", _pickled(content["tree"], content["tensors"]))
        _add(file, archive, "byteorder", b"little")
        for number, (dtype, shape, offset) in enumerate(content["tensors"]):
            num_bytes = math.prod(shape) * STORAGES[dtype][1]
            _add(file, archive, f"data/{number}", buffer[offset : offset + num_bytes])
        _add(file, archive, "version", b"3\n")
    summary = summarize(plain(content["tree"])) if summary is None else summary
    return seal(archive.pieces, summary), summary


def records(data: memoryview) -> dict[str, memoryview]:
    """Return the records of an archive by their names without its folder; nothing is copied.

    Raises:
        zipfile.BadZipFile: It is not an archive whose records are stored as they are.
    """
    found = {}
    with zipfile.ZipFile(_View(data)) as file:
        for each in file.infolist():
            if each.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("its records are compressed")
            name_length, extra_length = struct.unpack_from("<HH", data, each.header_offset + 26)
            start = each.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
            found[each.filename.partition("/")[2]] = data[start : start + each.file_size]
    return found


def summarize(content: dict[str, Any]) -> dict[str, Any]:
    """Return what the seal says of a content with counters and a run."""
    return {name: content[name] for name in (*COUNTERS, "format_version")} | {
        name: content["run"][name] for name in _SEALED_FROM_RUN
    }


def plain(node: Any) -> Any:
    """Return the tree of a header with None in the place of each tensor."""
    if not isinstance(node, dict):
        return node
    match node[KIND]:
        case "tensor":
            return None
        case "dict":
            return {key: plain(each) for key, each in node["items"]}
        case kind:
            items = [plain(each) for each in node["items"]]
            return tuple(items) if kind == "tuple" else items


class _View(io.RawIOBase):
    """A file to read whose content lies in memory already; BytesIO would copy it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._position + size
        found = bytes(self._data[self._position : end])
        self._position += len(found)
        return found

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}
        if origin[whence] + position < 0:
            raise OSError("a place before the beginning")
        self._position = origin[whence] + position
        return self._position


class _Pieces(io.RawIOBase):
    """A file whose content is kept as the pieces that were written, not copied together."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self._length = 0

    def write(self, data: Any) -> int:
        if len(data):
            self.pieces.append(data)
        self._length += len(data)
        return len(data)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._length

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        assert (position, whence) == (self._length, io.SEEK_SET), "it is written from front to back"
        return position


def _add(file: zipfile.ZipFile, archive: _Pieces, name: str, data: bytes | memoryview) -> None:
    """Add a record whose bytes begin at a multiple of 64, as those of torch do.

    ZipFile would take its CRC from zlib, which is a fifth as fast.
    """
    record = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    start = archive.tell() + _LOCAL_HEADER_BYTES + len(record.filename) + 4
    if len(data) > zipfile.ZIP64_LIMIT:
        start += _ZIP64_EXTRA_BYTES
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    record.external_attr = _OWNER_ONLY
    record.CRC = isal_zlib.crc32(data)
    record.compress_size = record.file_size = len(data)
    record.header_offset = archive.tell()
    archive.write(record.FileHeader())
    archive.write(data)
    file.filelist.append(record)
    file.start_dir = archive.tell()


# -- the pickle inside: a few opcodes, those that torch.load(weights_only=True) allows -------------


def _pickled(tree: Any, places: list[Any]) -> bytes:
    out = bytearray(pickle.PROTO + b"\x02")
    _emit(tree, places, out)
    return bytes(out + pickle.STOP)


def _emit(node: Any, places: list[Any], out: bytearray) -> None:
    if not isinstance(node, dict):
        out += _scalar(node)
    elif node[KIND] == "tensor":
        dtype, shape, _ = places[node["at"]]
        _emit_tensor(node["at"], dtype, shape, out)
    elif node[KIND] == "dict":
        out += pickle.EMPTY_DICT + pickle.MARK
        for key, each in node["items"]:
            out += _scalar(key)
            _emit(each, places, out)
        out += pickle.SETITEMS
    else:
        is_tuple = node[KIND] == "tuple"
        out += pickle.MARK if is_tuple else pickle.EMPTY_LIST + pickle.MARK
        for each in node["items"]:
            _emit(each, places, out)
        out += pickle.TUPLE if is_tuple else pickle.APPENDS


def _emit_tensor(number: int, dtype: str, shape: list[int], out: bytearray) -> None:
    """Emit the call that rebuilds a contiguous tensor from the storage `data/<number>`."""
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    out += _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
    out += pickle.MARK + _scalar("storage") + _global("torch", STORAGES[dtype][0])
    out += _scalar(str(number)) + _scalar("cpu") + _scalar(math.prod(shape))
    out += pickle.TUPLE + pickle.BINPERSID
    out += _scalar(0) + _tuple(shape) + _tuple(strides) + _scalar(False)
    out += _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    out += pickle.TUPLE + pickle.REDUCE


def _scalar(value: Any) -> bytes:
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            digits = pickle.encode_long(value)
            return pickle.LONG1 + bytes([len(digits)]) + digits
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case _:
            text = str(value).encode("utf-8", "surrogatepass")
            return pickle.BINUNICODE + struct.pack("<I", len(text)) + text


def _tuple(values: list[int]) -> bytes:
    return pickle.MARK + b"".join(map(_scalar, values)) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
