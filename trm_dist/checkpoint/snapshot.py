"""A snapshot: the whole training state at one batch boundary, as one flat buffer and a header.

The header is JSON, not pickle: the tree of plain values with a number in the place of each tensor,
and for each tensor its type, shape and offset. So any process can read a snapshot from shared
memory, and reading one runs no code. Every save goes the same way: capture, then publish.
"""

import json
import logging
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from trm_dist.checkpoint.archive import KIND, STORAGES

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name[6:]) for name in STORAGES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLAIN = frozenset({bool, int, float, str, type(None)})

Place = tuple[str, list[int], int]
"""Type, shape and offset of a tensor in a buffer."""


class Views:
    """The tensors that lie in a buffer, kept from copy to copy as long as they lie there alike."""

    def __init__(self, buffer: memoryview) -> None:
        """Of a buffer, which must be writable or stay as it is."""
        self._buffer = buffer
        self._places: list[Place] = []
        self._tensors: list[Tensor] = []

    def at(self, places: list[Place]) -> list[Tensor]:
        """Return the tensors at some places."""
        if places != self._places:
            self._places, self._tensors = places, [_view(self._buffer, *each) for each in places]
        return self._tensors


class Flat:
    """A tree taken apart: its tensors still those of the live state, and the header."""

    def __init__(self, tree: dict[str, Any]) -> None:
        """Take a tree apart; nothing is copied yet.

        Args:
            tree: Dicts, lists and tuples of tensors, numbers, strings, booleans and None.

        Raises:
            TypeError: It holds something else.
        """
        self._tensors: list[Tensor] = []
        skeleton = _take_out(tree, self._tensors)
        self._places: list[Place] = []
        self.num_bytes = 0
        for tensor in self._tensors:
            self._places.append((_NAMES[tensor.dtype], list(tensor.shape), self.num_bytes))
            num_bytes = tensor.nbytes
            self.num_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.header = json.dumps({"tree": skeleton, "tensors": self._places}).encode()

    def copy_to(self, buffer: memoryview) -> None:
        """Copy all tensors into a buffer of at least `num_bytes`; the state may change then."""
        self.copy_into(Views(buffer))

    def copy_into(self, views: Views) -> None:
        """Copy all tensors into a buffer that was perhaps copied into before; see `copy_to`."""
        targets = views.at(self._places)
        near: tuple[list[Tensor], list[Tensor]] = ([], [])
        has_far = False
        for target, tensor in zip(targets, self._tensors, strict=True):
            if tensor.is_cuda:
                target.copy_(tensor.detach(), non_blocking=True)
                has_far = True
            else:
                near[0].append(target)
                near[1].append(tensor.detach())
        if near[0]:
            torch._foreach_copy_(*near)
        if has_far:
            torch.cuda.current_stream().synchronize()


def pin(buffer: memoryview) -> None:
    """Let a GPU write into a buffer by itself, for as long as this process lives.

    Without it a copy goes through a small buffer of the driver, at about a third of the speed.
    """
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
    if code:
        logger.warning("snapshots are copied more slowly: their memory cannot be pinned (%d)", code)
        # CUDA keeps the error for whoever asks next, and torch asks after each kernel.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")


def unflatten(header: bytes, buffer: memoryview) -> dict[str, Any]:
    """Return the tree; its tensors are views of the buffer, which must be writable or stay."""
    content = json.loads(header)
    tensors = Views(buffer).at(content["tensors"])
    tree: dict[str, Any] = _put_back(content["tree"], tensors)
    return tree


def _view(buffer: memoryview, dtype: str, shape: list[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    flat = torch.frombuffer(buffer, dtype=_DTYPES[dtype], count=count, offset=offset)
    return flat.view(shape)


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """Replace tensors by their number, and say the kind of every container."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor) and value.dtype in _NAMES:
        tensors.append(value)
        return {KIND: "tensor", "at": len(tensors) - 1}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        items = [
            [key, each if type(each) in _PLAIN else _take_out(each, tensors)]
            for key, each in value.items()
        ]
        return {KIND: "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_take_out(each, tensors) for each in value]
        return {KIND: "tuple" if isinstance(value, tuple) else "list", "items": items}
    if isinstance(value, int | float | str):  # of a type of its own
        return value
    raise TypeError(f"a snapshot holds tensors and plain values, not {type(value).__name__}")


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    match value[KIND]:
        case "tensor":
            return tensors[value["at"]]
        case "dict":
            return {key: _put_back(each, tensors) for key, each in value["items"]}
        case kind:
            items = [_put_back(each, tensors) for each in value["items"]]
            return tuple(items) if kind == "tuple" else items
