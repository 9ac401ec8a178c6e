"""A snapshot: the whole training state at one batch boundary, as one flat buffer and a header.

The header is JSON, not pickle: the tree of plain values with a number in the place of each tensor,
and for each tensor its type, shape and offset. So any process can read a snapshot from shared
memory, and reading one runs no code. Every save goes the same way: capture, then publish.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 64
_KIND = "$"
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


class Snapshot:
    """One slot that is captured into again and again; its buffer is allocated once and grows."""

    def __init__(self) -> None:
        self.header = b""
        self.buffer: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def capture(self, tree: dict[str, Any]) -> None:
        """Copy everything; the state may change once this returns.

        Args:
            tree: Dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        """
        tensors: list[Tensor] = []
        skeleton = _take_out(tree, tensors)
        places: list[tuple[str, list[int], int]] = []
        size = 0
        for tensor in tensors:
            places.append((str(tensor.dtype), list(tensor.shape), size))
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if self.buffer.size < size:
            self.buffer = np.zeros(size, dtype=np.uint8)
        targets = [_view(self.buffer, *place) for place in places]
        if tensors:
            torch._foreach_copy_(targets, [tensor.detach() for tensor in tensors])
        self.header = json.dumps({"tree": skeleton, "tensors": places}).encode()

    def tree(self) -> dict[str, Any]:
        """Return the captured tree; its tensors are views of the buffer, valid until the next."""
        header = json.loads(self.header)
        tensors = [_view(self.buffer, *place) for place in header["tensors"]]
        tree: dict[str, Any] = _put_back(header["tree"], tensors)
        return tree


def _view(buffer: npt.NDArray[np.uint8], dtype: str, shape: list[int], offset: int) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    # frombuffer, not a slice: each tensor gets a storage of its own, so torch.save writes it alone.
    flat = torch.frombuffer(buffer, dtype=_DTYPES[dtype], count=count, offset=offset)
    return flat.view(shape)


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """Replace tensors by their number, and say the kind of every container."""
    if isinstance(value, Tensor) and str(value.dtype) in _DTYPES:
        tensors.append(value)
        return {_KIND: "tensor", "at": len(tensors) - 1}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        items = [[key, _take_out(each, tensors)] for key, each in value.items()]
        return {_KIND: "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_take_out(each, tensors) for each in value]
        return {_KIND: "tuple" if isinstance(value, tuple) else "list", "items": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a snapshot holds tensors and plain values, not {type(value).__name__}")


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    match value[_KIND]:
        case "tensor":
            return tensors[value["at"]]
        case "dict":
            return {key: _put_back(each, tensors) for key, each in value["items"]}
        case kind:
            items = [_put_back(each, tensors) for each in value["items"]]
            return tuple(items) if kind == "tuple" else items
