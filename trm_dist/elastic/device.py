"""What computes: the processor, or one GPU for each worker of a node."""

import os
import shutil
import socket
import subprocess
import sysconfig
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
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


def check_compiler(wanted: Kind, cpu_capability: str) -> None:
    """Check that torch's compiler can write kernels here.

    Args:
        wanted: What computes.
        cpu_capability: The level of processor instructions that every node shall use.

    Raises:
        ConfigError: Something is missing, or a level is asked for.
    """
    is_cpu = _kind(wanted) == "cpu"
    if is_cpu and cpu_capability != "auto":
        raise ConfigError(
            f"--compile writes kernels for the processor that is here, and --cpu-capability "
            f"{cpu_capability} asks for one kind of them on every node. Leave out one of the two."
        )
    missing = [what for what, is_there in _needs_of_compiler(is_cpu).items() if not is_there]
    if missing:
        raise ConfigError(
            f"--compile needs {' and '.join(missing)}, which is not here. Install that, or leave "
            "the flag out (--no-compile goes on without it)."
        )


@cache
def compiler_name(wanted: Kind) -> str:
    """Return what compiles kernels here, with its version."""
    if _kind(wanted) == "cuda":
        return f"triton {version('triton')}"
    command = [os.environ.get("CXX", "g++"), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return told.stdout.partition("\n")[0]


def _needs_of_compiler(is_cpu: bool) -> dict[str, bool]:
    """Return what compiling takes, as inductor and triton look for it, and whether it is here."""
    # Debian's own Python names a place for packages of the machine, where no header lies.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = os.path.join(sysconfig.get_path("include", scheme), "Python.h")
    needs = {f"Python's header {header}": os.path.exists(header)}
    if is_cpu:
        return needs | {"a C++ compiler": bool(shutil.which(os.environ.get("CXX", "g++")))}
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return needs | {
        "a C compiler": any(map(shutil.which, compilers)),
        "the package triton": find_spec("triton") is not None,
    }


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
