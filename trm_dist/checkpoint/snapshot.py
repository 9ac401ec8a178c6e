"""A snapshot: the whole training state at one batch boundary, as one flat buffer and a header.

The header is JSON, not pickle: the tree of plain values with a number in the place of each tensor,
and for each tensor its type, shape and offset. So any process can read a snapshot from shared
memory, and reading one runs no code. Every save goes the same way: capture, then publish.
"""

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from json.encoder import encode_basestring_ascii
from typing import Any

import torch
from torch import Tensor

from trm_dist.checkpoint.archive import KIND, STORAGES

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name[6:]) for name in STORAGES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KEYS = (str, int)
_PLAIN: dict[type, Callable[[Any], str]] = {
    str: encode_basestring_ascii, int: repr, float: json.dumps,
    bool: ("false", "true").__getitem__, type(None): json.dumps,
}  # fmt: skip
"""Plain values and how JSON writes them: json.dumps takes ten times as long for one of them."""

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


class Layout:
    """Where tensors lie in a buffer; used again for the next ones that are like them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        """Find it out.

        Raises:
            TypeError: A snapshot does not hold tensors of such a type.
        """
        self._dtypes = [each.dtype for each in tensors]
        self._shapes = [each.shape for each in tensors]
        self.places: list[Place] = []
        self.num_bytes = 0
        for tensor in tensors:
            if tensor.dtype not in _NAMES:
                raise _refused(tensor)
            self.places.append((_NAMES[tensor.dtype], list(tensor.shape), self.num_bytes))
            self.num_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.as_json = json.dumps(self.places)

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Tell whether these tensors have it."""
        return [each.shape for each in tensors] == self._shapes and [
            each.dtype for each in tensors
        ] == self._dtypes


class Flat:
    """A tree taken apart: its tensors still those of the live state, and the header."""

    def __init__(self, tree: dict[str, Any], layout: Layout | None = None) -> None:
        """Take a tree apart; nothing is copied yet.

        Args:
            tree: Dicts, lists and tuples of tensors, numbers, strings, booleans and None.
            layout: Of a tree before, which is probably that of this one.

        Raises:
            TypeError: It holds something else.
        """
        self._tensors: list[Tensor] = []
        skeleton = _as_json(tree, self._tensors)
        if layout is None or not layout.is_of(self._tensors):
            layout = Layout(self._tensors)
        self.layout = layout
        self.num_bytes = layout.num_bytes
        self.header = f'{{"tree": {skeleton}, "tensors": {layout.as_json}}}'.encode()

    def copy_to(self, buffer: memoryview) -> None:
        """Copy all tensors into a buffer of at least `num_bytes`; the state may change then."""
        self.copy_into(Views(buffer))

    @torch.no_grad()
    def copy_into(self, views: Views) -> None:
        """Copy all tensors into a buffer that was perhaps copied into before; see `copy_to`."""
        targets = views.at(self.layout.places)
        if any(each.is_cuda for each in self._tensors):
            for target, tensor in zip(targets, self._tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        elif targets:
            torch._foreach_copy_(targets, self._tensors)


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


def _as_json(value: Any, tensors: list[Tensor]) -> str:
    """Write a tree as JSON: a number for each tensor, and the kind of every container."""
    if plain := _PLAIN.get(type(value)):
        return plain(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return f'{{"{KIND}": "tensor", "at": {len(tensors) - 1}}}'
    if isinstance(value, dict) and all(isinstance(key, _KEYS) for key in value):
        items = [
            f"[{_as_json(key, tensors)}, {_as_json(each, tensors)}]" for key, each in value.items()
        ]
        return f'{{"{KIND}": "dict", "items": [{", ".join(items)}]}}'
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        items = [_as_json(each, tensors) for each in value]
        return f'{{"{KIND}": "{kind}", "items": [{", ".join(items)}]}}'
    if isinstance(value, int | float | str):  # of a type of its own
        return json.dumps(value)
    raise _refused(value)


def _refused(value: object) -> TypeError:
    what = value.dtype if isinstance(value, Tensor) else type(value).__name__
    return TypeError(f"a snapshot holds tensors and plain values, not {what}")


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
