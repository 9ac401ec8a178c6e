"""What a checkpoint holds, how it becomes bytes and comes back, and its digest.

One file, loadable by a bare `torch.load(path)`: tensors, numbers, strings, lists and dicts only.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trm_dist.checkpoint.archive import STORAGES, encode, records
from trm_dist.checkpoint.names import parse_epoch_name
from trm_dist.checkpoint.seal import Piece, verify_seal
from trm_dist.checkpoint.snapshot import Flat
from trm_dist.errors import CorruptCheckpointError
from trm_dist.progress import COUNTERS

FORMAT_VERSION = 1

KEYS = frozenset(COUNTERS) | {
    "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "ema_state_dict",
    "rng_state", "config", "dataset", "world", "run", "format_version",
}  # fmt: skip
"""Top-level keys of a checkpoint."""

MODEL_KEYS = frozenset({"model_state_dict", "config", "dataset", "format_version"})
"""Those that an exported model has too."""

_DIGEST_SECTIONS = ("model_state_dict", "ema_state_dict", "optimizer_state_dict")


def sealed(content: dict[str, Any]) -> list[Piece]:
    """Return any content of tensors and plain values as a sealed file that `torch.load` reads."""
    flat = Flat(content)
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)
    pieces, _ = encode(flat.header, buffer)
    return pieces


def from_bytes(data: bytes | memoryview, keys: frozenset[str] = KEYS) -> dict[str, Any]:
    """Verify and load a checkpoint; never runs code that the bytes might carry.

    Args:
        data: The whole file. Tensors are views of it, so it must stay as it is while they are used.
        keys: What it must have.

    Raises:
        CorruptCheckpointError: The bytes are not what was written, or no checkpoint of this format.
    """
    verify_seal(data)
    view = memoryview(bytearray(data)) if memoryview(data).readonly else memoryview(data)
    try:
        found = records(view)
        state = _Loader(found).load()
    # A pickle that is none, or is not of this format, fails in many ways; all mean the same here.
    except Exception as error:
        raise CorruptCheckpointError(
            f"it cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= keys:
        raise CorruptCheckpointError("it does not hold a training state")
    if not isinstance(state["format_version"], int):
        raise CorruptCheckpointError("its format_version is not a number")
    if state["format_version"] > FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"its format_version {state['format_version']} is newer than this program's "
            f"{FORMAT_VERSION}; update trm_dist"
        )
    return state


def digest(state: Mapping[str, Any]) -> str:
    """Return the sha256 of weights, averaged weights and optimizer state.

    Every tensor of model_state_dict, ema_state_dict and optimizer_state_dict, in this order and
    inside each by its path as text; of each its path, type, shape and little-endian bytes.
    """
    total = hashlib.sha256()
    for section in _DIGEST_SECTIONS:
        for path, tensor in sorted(_tensors(state[section], section)):
            total.update(f"{path} {tensor.dtype} {list(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def find_damage(data: bytes | memoryview, name: str) -> list[str]:
    """Look for everything that can be wrong with a checkpoint, beyond what a resume checks.

    Args:
        data: All bytes of the file.
        name: Its name, whose counters must be those inside.

    Returns:
        What is wrong, in words; empty when the checkpoint is good.
    """
    try:
        state = from_bytes(data)
    except CorruptCheckpointError as error:
        return [str(error)]
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        found.append(f"the CRC of its record {damaged} does not match")
    summary = verify_seal(data).summary
    found += [
        f"its seal says {name}={summary.get(name)} and its content {state[name]}"
        for name in COUNTERS
        if summary.get(name) != state[name]
    ]
    counters = state["epoch"], state["batch_idx"]
    if parse_epoch_name(name) not in {None, counters}:
        found.append(f"its name does not say epoch {counters[0]} batch {counters[1]}")
    found += [
        f"{path} holds values that are not finite"
        for section in _DIGEST_SECTIONS
        for path, tensor in _tensors(state[section], section)
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    return found


class _Loader(pickle.Unpickler):
    """Reads what torch.save writes of plain values and dense tensors, and nothing else.

    Unlike torch.load it leaves the tensors where they are: as views of the file's bytes.
    """

    def __init__(self, found: Mapping[str, memoryview]) -> None:
        super().__init__(io.BytesIO(found["data.pkl"]))
        self._found = found

    def find_class(self, module: str, name: str) -> Any:
        """Return the few globals of the format, none of which does anything else."""
        try:
            return _GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint") from None

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("not a storage")
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._found[f"data/{key}"], dtype=dtype, count=count)


def _rebuild_tensor(
    storage: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(shape, strides, offset)


_GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "collections.OrderedDict": dict,
    **{f"torch.{storage}": getattr(torch, name[6:]) for name, (storage, _) in STORAGES.items()},
}


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{path}.{number}")
