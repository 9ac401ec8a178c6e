"""Models as files of their own: written as safetensors, and loaded from whatever holds one.

from trm_dist.export import load_model
model = load_model("model.safetensors")
tokens, steps = model.task.answer(questions)      # int64 [N, L]
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

from trm_dist.checkpoint.names import is_checkpoint_name
from trm_dist.checkpoint.state import MODEL_KEYS, from_bytes
from trm_dist.checkpoint.store import open_store, split_url
from trm_dist.config import Config
from trm_dist.errors import CorruptCheckpointError, UserError
from trm_dist.inspection import checkpoints_at
from trm_dist.logs import say
from trm_dist.model.supervision import Supervision
from trm_dist.model.trm import Trm
from trm_dist.plan import shape_of
from trm_dist.progress import COUNTERS

SUFFIX = ".safetensors"

Weights = Literal["ema", "raw"]

_KEPT = (*COUNTERS, "config", "dataset", "run", "format_version")


@dataclass(frozen=True, slots=True)
class ExportArguments:
    """Write the weights of a checkpoint with their configuration as safetensors."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Checkpoint, or a directory, of which the newest checkpoint is taken."""
    out: str = "model.safetensors"
    """File to write: a path or a URL."""
    weights: Weights = "ema"
    """Averaged weights, or those of the last step."""


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model and what it was trained as."""

    name: str
    task: Supervision
    config: Config
    codec: str


def export(arguments: ExportArguments) -> int:
    """Write the file and return the exit code.

    Raises:
        UserError: There is no such checkpoint, or the file cannot be written.
    """
    directory, name = split_url(arguments.out)
    if not name.endswith(SUFFIX) or is_checkpoint_name(name):
        raise UserError(f"--out {arguments.out}: give a file whose name ends in {SUFFIX}.")
    source, state = _read(arguments.path)
    content = _to_safetensors(_weights(source, state, arguments.weights), {
        **{key: state[key] for key in _KEPT}, "weights": arguments.weights,
    })  # fmt: skip
    try:
        open_store(directory).put(name, [content])
    except OSError as error:
        raise UserError(f"--out {arguments.out} cannot be written: {error}.") from error
    say(f"{arguments.out}: {arguments.weights} weights of {source}, {len(content)} bytes")
    return 0


def load_model(path: str, weights: Weights = "ema") -> Model:
    """Load a model from a checkpoint, a directory of them, or an exported file.

    Args:
        path: A path or URL.
        weights: Averaged weights, or those of the last step.

    Raises:
        UserError: There is none, it is damaged, or it has no such weights.
    """
    name, state = _read(path)
    known = Config().flat().keys()
    stored = {key: value for key, value in state["config"].items() if key in known}
    config = Config().with_values(stored)
    module = Trm(
        shape_of(config, state["dataset"]["num_tokens"], state["dataset"].get("num_puzzles", 1)),
        seed=config.data.seed,
        precision=config.train.precision,
    )
    module.load_state_dict(_weights(name, state, weights))
    task = Supervision(
        module,
        n_sup=config.train.n_sup,
        halt_explore=0.0,
        loss=config.train.loss,
        seed=config.data.seed,
    )
    return Model(name, task, config, state["dataset"]["codec"])


def _read(path: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a file and what it holds."""
    try:
        if path.endswith(SUFFIX):
            directory, name = split_url(path)
            return name, _from_safetensors(bytes(open_store(directory).read(name)))
        store, names = checkpoints_at(path)
        name = names[-1]
        return name, from_bytes(store.view(name), MODEL_KEYS)
    except CorruptCheckpointError as error:
        raise UserError(
            f"{name} is damaged: {error}. `trm_dist verify {path}` names the good ones."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _weights(name: str, state: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the weights of one kind, with the buffers, which are not averaged."""
    has = state.get("weights", "ema")  # of a file that holds one kind
    averages = state.get("ema_state_dict")
    if averages is None and weights != has:
        raise UserError(f"{name} is an exported model and has {has} weights only.")
    found = dict(state["model_state_dict"])
    if averages is not None and weights == "ema":
        found |= averages["weights"]
    return found


# -- safetensors -----------------------------------------------------------------------------------


def _to_safetensors(tensors: Mapping[str, Any], about: Mapping[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("safetensors is missing: pip install 'trm_dist[export]'.") from error
    metadata = {"format": "pt", "trm_dist": json.dumps(about)}
    whole = {name: torch.as_tensor(each).contiguous() for name, each in tensors.items()}
    return save(whole, metadata)


def _from_safetensors(content: bytes) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise UserError("safetensors is missing: pip install 'trm_dist[export]'.") from error
    try:
        (length,) = struct.unpack("<Q", content[:8])
        about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["trm_dist"])
        return {**about, "model_state_dict": load(content)}
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CorruptCheckpointError(f"this is no export of trm_dist ({error!r})") from error
