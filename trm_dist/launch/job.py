"""What `trm_dist launch` can be told, and the job that this makes with the flags of `train`."""

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from trm_dist.config import Config, SpotConfig, flag
from trm_dist.elastic.capability import pin_capability
from trm_dist.errors import ConfigError

_KILL_S = 2
"""What workers that do not stop within the grace period are given on top of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How a run is kept going on this node."""

    nproc_per_node: int = 1
    """Workers of this node."""
    nnodes: str = "1"
    """Nodes of the run: a number, or MIN:MAX when they come and go."""
    rdzv_endpoint: str = ""
    """HOST:PORT of a `trm_dist rendezvous`; needed by more than one node."""
    rdzv_id: str = ""
    """Name of the run at the rendezvous; empty: made from --checkpoint-dir."""
    local_addr: str = ""
    """Address at which the other nodes reach this one; empty: what its name stands for."""
    health_port: int = 0
    """Port of /healthz; 0: none."""

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1:
            raise ConfigError(f"--nproc-per-node {self.nproc_per_node} must be at least 1.")
        least, most = self.nodes()
        if not 1 <= least <= most:
            raise ConfigError(f"--nnodes {self.nnodes}: give a number, or MIN:MAX with 1 <= MIN.")
        if most > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, where the nodes meet. "
                "Start `trm_dist rendezvous` on a machine that stays."
            )
        if self.rdzv_endpoint and not _is_endpoint(self.rdzv_endpoint):
            raise ConfigError(f"--rdzv-endpoint {self.rdzv_endpoint}: give HOST:PORT.")
        if not 0 <= self.health_port < 1 << 16:
            raise ConfigError(f"--health-port {self.health_port} is not a port.")

    def nodes(self) -> tuple[int, int]:
        """Return the least and the greatest number of nodes."""
        least, _, most = self.nnodes.partition(":")
        try:
            return int(least), int(most or least)
        except ValueError:
            return 0, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """How a node takes part in the rendezvous."""

    job: str
    """Name that all nodes of a run have in common."""
    endpoint: str
    """HOST:PORT of the store; empty: this node is alone."""
    min_nodes: int
    max_nodes: int
    num_workers: int
    """Of this node."""
    local_addr: str
    """Where the others reach this node; empty: what its name stands for."""
    command: Sequence[str]
    """Stands for a worker."""
    shutdown_s: int
    """How long workers may take to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a supervisor keeps going."""

    member: Member
    launch_id: str
    arguments: list[str]
    """Of the workers."""
    environment: Mapping[str, str]
    """Of all processes."""
    grace_s: float
    """How long a stop may take."""
    max_no_progress: int
    health_port: int
    spot: SpotConfig


def job_of(
    launch: LaunchConfig, config: Config, given: Iterable[str], environment: Mapping[str, str]
) -> Job:
    """Return what a supervisor does about these settings.

    Args:
        launch: The flags of `launch` itself.
        config: Those of `train`.
        given: Names of the settings that were really given.
        environment: Of this process.

    Raises:
        ConfigError: This processor cannot do what it shall.
    """
    variables = dict(environment)
    pin_capability(config.train.cpu_capability, variables)
    # One thread until a worker asks for more: a process with several cannot be forked.
    variables.setdefault("OMP_NUM_THREADS", "1")
    variables["OPENBLAS_NUM_THREADS"] = "1"
    # A process that has asked the driver itself whether there is a GPU cannot be forked either.
    variables["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it tells of every missing name
    least, most = launch.nodes()
    if most > 1:
        # Else the workers look for each other through the agents' store, whose address torch
        # keeps although its owner has gone.
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    name = launch.rdzv_id or _name_of(config.checkpoint.checkpoint_dir)
    is_alone = not (launch.rdzv_id or launch.rdzv_endpoint)
    return Job(
        member=Member(
            job=name,
            endpoint=launch.rdzv_endpoint,
            min_nodes=least,
            max_nodes=most,
            num_workers=launch.nproc_per_node,
            local_addr=launch.local_addr,
            command=(),
            shutdown_s=math.ceil(config.checkpoint.grace_period) + _KILL_S,
        ),
        launch_id=f"{os.getpid()}-{secrets.token_hex(4)}" if is_alone else name,
        arguments=arguments_of(config, given),
        environment=variables,
        grace_s=config.checkpoint.grace_period,
        max_no_progress=config.train.max_no_progress,
        health_port=launch.health_port,
        spot=config.spot,
    )


def arguments_of(config: Config, given: Iterable[str]) -> list[str]:
    """Return the command line that gives these settings."""
    flat = config.flat()
    return [_argument(name, flat[name]) for name in sorted(given)]


def _argument(name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)}={value}"


def _name_of(checkpoint_dir: str) -> str:
    """Name a run by where its checkpoints lie, the same on all nodes."""
    url = checkpoint_dir if "://" in checkpoint_dir else os.path.abspath(checkpoint_dir)
    return blake2b(url.encode(), digest_size=6).hexdigest()


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 1 << 16
