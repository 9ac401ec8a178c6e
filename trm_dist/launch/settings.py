"""What `trm_dist launch` can be told, beside everything that `trm_dist train` can be told."""

from collections.abc import Sequence
from dataclasses import dataclass

from trm_dist.errors import ConfigError


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


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 1 << 16
