"""Who is there: this worker's place in the group, and the few things a group does together.

The only owner of the process group. Parts of the trainer receive a `World` or plain values and
never ask torch.distributed for a rank.
"""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from trm_dist.elastic.agent import LAUNCH, num_restarts
from trm_dist.elastic.device import Backend, gpu_identity
from trm_dist.elastic.process import start_mark
from trm_dist.elastic.reduction import OVER_GLOO, Carrier
from trm_dist.errors import ConfigError

JOIN_TIMEOUT_S = 300.0
PATIENCE_S = 1800.0
"""How long a collective may take when --hang-timeout is found out; a watchdog is there before."""
_EXCUSE = "trm_dist/excuse"
_EXCUSE_EVERY_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.1


@dataclass(frozen=True, slots=True)
class World:
    """This worker's place, as torchrun's environment tells it; alone without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_nodes: int = 1
    restarts: int = 0
    """How often the launcher of this node has started the workers before."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and the count of restarts."""
        size = int(environment.get("WORLD_SIZE", "1"))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
        return cls(
            rank=int(environment.get("RANK", "0")),
            size=size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            num_nodes=-(-size // local_size),
            restarts=num_restarts(environment),
        )

    @property
    def is_first_of_node(self) -> bool:
        """Whether this worker keeps the memory snapshots of its node."""
        return self.local_rank == 0

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes checkpoints and speaks for the run."""
        return self.rank == 0


class Group:
    """A formed process group."""

    def __init__(self, world: World, store: dist.Store, timeout: timedelta) -> None:
        self.world = world
        self._store, self._timeout = store, timeout
        self._excuses = 0
        self._excused_s = 0.0

    def excuse(self) -> None:
        """Tell the others that there is a good reason to wait for this worker; any thread."""
        if time.monotonic() - self._excused_s > _EXCUSE_EVERY_S:
            self._excused_s = time.monotonic()
            self._store.add(_EXCUSE, 1)

    def is_excused(self) -> bool:
        """Tell whether somebody has had a good reason to wait since this was last asked."""
        known, self._excuses = self._excuses, int(self._store.add(_EXCUSE, 0))
        return self._excuses > known

    def sum_(self, values: Tensor) -> Tensor:
        """Add up a tensor over all workers, in place.

        Exact whatever the order, as long as each entry is zero on all workers but one, or whole.
        """
        if self.world.size > 1:
            near = values.cpu()  # itself where it is there already
            dist.all_reduce(near)
            if near is not values:
                values.copy_(near)
        return values

    def carrier(self, wanted: Backend, device: torch.device) -> Carrier:
        """Return what carries the gradients; all workers call it.

        Args:
            wanted: auto: NCCL where every worker has a GPU of its own.
            device: What this worker computes on.

        Raises:
            ConfigError: NCCL is wanted and cannot be had; in all workers alike.
        """
        if self.world.size == 1 or wanted == "gloo":
            return OVER_GLOO
        gpus = [each.decode() for each in self.gather(gpu_identity(device).encode())]
        trouble = why_not_nccl(gpus)
        if trouble and wanted == "auto":
            return OVER_GLOO
        if trouble:
            message = (
                f"--backend nccl cannot carry the gradients: {trouble}. Start as many workers on a "
                "node as it has GPUs, or leave the flag out."
            )
            raise ConfigError(message if self.world.is_writer else "")
        # Any other way to deal with a lost worker may let this one go on with half a sum.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        group = dist.new_group(backend="nccl", timeout=self._timeout)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # it connects now
        return Carrier(group, device)

    def broadcast(self, data: bytes | memoryview, source: int = 0) -> memoryview:
        """Send one worker's bytes to everyone; what others pass in is ignored."""
        if self.world.size == 1:
            return memoryview(data)
        is_source = self.world.rank == source
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=source)
        if is_source and data:
            writable = data if isinstance(data, memoryview) and not data.readonly else None
            buffer = torch.frombuffer(writable or bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.broadcast(buffer, src=source)
        return buffer.numpy().data

    def gather(self, data: bytes) -> list[bytes]:
        """Return what every worker brings, by rank."""
        return [bytes(self.broadcast(data, source)) for source in range(self.world.size)]

    def barrier(self) -> None:
        """Wait for everyone."""
        if self.world.size > 1:
            dist.barrier()


def form_group(world: World, environment: Mapping[str, str], hang_timeout_s: float) -> Group:
    """Form the process group with gloo.

    A worker that waits for another one longer than `hang_timeout_s` takes it for lost.

    torchrun keeps one key-value store over all restarts of the workers, and gloo would meet the
    addresses of dead ones in it. So each start of the group meets under a prefix of its own,
    whatever way it was started, also after a change of membership, which has no counter.
    """
    if world.size == 1:
        store: dist.Store = dist.HashStore()
    else:
        is_host = world.is_writer and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        shared = dist.TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            world.size,
            is_master=is_host,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
        )
        store = dist.PrefixStore(agree_on_prefix(shared, world), shared)
    timeout = timedelta(seconds=hang_timeout_s)
    dist.init_process_group(
        "gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    return Group(world, store, timeout)


def why_not_nccl(gpus: Sequence[str]) -> str:
    """Say why NCCL cannot carry gradients between workers; empty: it can.

    Asked of NCCL itself, only the workers that share a GPU would hear of it; the others would wait.

    Args:
        gpus: `gpu_identity` of each worker's device, by rank.
    """
    if "" in gpus:
        return f"worker {gpus.index('')} has no GPU"
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            return f"workers {gpus.index(gpu)} and {rank} share a GPU"
    return "" if dist.is_nccl_available() else "this build of torch has no NCCL"


def agree_on_prefix(store: dist.Store, world: World) -> str:
    """Agree on a name for this start of the group, in a store full of leftovers.

    Every worker brings a word nobody used before. The writer offers the list of words it finds; a
    worker accepts only an offer that holds its own word, under the writer's word, which names the
    group. Leftovers of dead workers make offers that nobody living accepts, and are replaced.

    Raises:
        TimeoutError: Somebody did not come within JOIN_TIMEOUT_S.
    """
    word = secrets.token_hex(8)
    store.set(f"trm_dist/word/{world.rank}", word)
    agree = _gather_words if world.is_writer else _accept_offer
    deadline, pause_s = time.monotonic() + JOIN_TIMEOUT_S, _FIRST_PAUSE_S
    while time.monotonic() < deadline:
        if prefix := agree(store, world, word):
            return prefix
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LONGEST_PAUSE_S)
    raise TimeoutError(f"the {world.size} workers did not all come within {JOIN_TIMEOUT_S:.0f} s")


def _gather_words(store: dist.Store, world: World, word: str) -> str:
    """Offer the words found so far; return the group's name once everyone accepted."""
    keys = [f"trm_dist/word/{rank}" for rank in range(world.size)]
    if not all(store.check([key]) for key in keys):
        return ""
    words = [store.get(key).decode() for key in keys]
    store.set("trm_dist/offer", ",".join(words))
    accepted = [f"trm_dist/accepted/{word}/{each}" for each in words[1:]]
    return f"trm_dist/group/{word}" if all(store.check([key]) for key in accepted) else ""


def _accept_offer(store: dist.Store, world: World, word: str) -> str:
    """Accept the offer that holds this worker's word in its place."""
    if not store.check(["trm_dist/offer"]):
        return ""
    words = store.get("trm_dist/offer").decode().split(",")
    if len(words) != world.size or words[world.rank] != word:
        return ""
    store.set(f"trm_dist/accepted/{words[0]}/{word}", "1")
    return f"trm_dist/group/{words[0]}"


def launch_id(environment: Mapping[str, str]) -> str:
    """Name this launch, the same for every restart of its workers.

    An id that a person gave torchrun counts for all nodes; else the agent itself is the launch.
    """
    if LAUNCH in environment:
        return environment[LAUNCH]
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    if run_id and run_id != "none":
        return run_id
    parent = os.getppid() if run_id else os.getpid()
    return f"{parent}-{start_mark(parent)}"
