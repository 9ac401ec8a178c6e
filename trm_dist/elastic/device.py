"""What computes: the processor, or one GPU for each worker of a node."""

import os
import socket
from typing import Literal

import torch

from trm_dist.errors import ConfigError

Kind = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "gloo", "nccl"]


def take_device(wanted: Kind, backend: Backend, local_rank: int) -> torch.device:
    """Take what this worker computes on; a GPU becomes the current one.

    Args:
        wanted: auto: a GPU where this machine has one.
        backend: What shall carry gradients; NCCL does so from GPU to GPU only.
        local_rank: Of this worker on its node. Worker i takes GPU i, and more workers than GPUs
            share them.

    Raises:
        ConfigError: A GPU is wanted, or NCCL, and none can be used.
    """
    if _kind(wanted) == "cpu":
        if backend == "nccl":
            raise ConfigError(
                "--backend nccl carries gradients from GPU to GPU, and here a processor computes. "
                "Leave the flag out."
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count or not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: {_why_none()}. Give the machine (or the container) one, or leave the "
            "flag out to train on processors."
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def device_name(wanted: Kind) -> str:
    """Return the name of what this worker computes on: cpu, or that of the current GPU."""
    return "cpu" if _kind(wanted) == "cpu" else torch.cuda.get_device_name()


def gpu_identity(device: torch.device) -> str:
    """Name a GPU among all machines, as NCCL tells them apart; empty: it is none."""
    if device.type != "cuda":
        return ""
    host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
    return f"{host} {torch.cuda.get_device_properties(device).uuid}"


def _kind(wanted: Kind) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _why_none() -> str:
    if torch.version.cuda is None:
        return f"this build of torch ({torch.__version__}) is for processors only"
    return f"torch {torch.__version__} finds no GPU that it can use here"
