"""Who is there: torchrun's environment, the name of a launch, the name of a group."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trm_dist.elastic.world import Group, World, agree_on_prefix, launch_id, why_not_nccl

ROOT = Path(__file__).parents[2]
PRINT_LAUNCH_ID = """
from trm_dist.elastic.world import launch_id
print(launch_id({"TORCHELASTIC_RUN_ID": "none"}), end="")
"""


@pytest.fixture(params=["hash", "tcp"])
def store(request: pytest.FixtureRequest) -> Iterator[dist.Store]:
    if request.param == "hash":
        yield dist.HashStore()
    else:
        yield dist.TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False
        )


def agree(store: dist.Store, size: int, *, late: int = -1) -> list[str]:
    """Let the workers of one start of a group agree; the one that is late comes after a while."""
    others_wait = threading.Event()

    def work(rank: int) -> str:
        if rank == late:
            others_wait.wait(0.1)
        return agree_on_prefix(store, World(rank=rank, size=size))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def die_in_the_middle(store: dist.Store, words: list[str], *, num_accepted: int = 0) -> None:
    """Leave what a group leaves whose workers died while they agreed."""
    for rank, word in enumerate(words):
        store.set(f"trm_dist/word/{rank}", word)
    store.set("trm_dist/offer", ",".join(words))
    for word in words[1 : 1 + num_accepted]:
        store.set(f"trm_dist/accepted/{words[0]}/{word}", "1")


# -- the place of a worker -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(rank=0, size=1, local_rank=0, num_nodes=1)),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            World(rank=0, size=1, local_rank=0, num_nodes=1),
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
            World(rank=3, size=4, local_rank=3, num_nodes=1),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            World(rank=5, size=8, local_rank=1, num_nodes=4),
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            World(rank=2, size=3, local_rank=0, num_nodes=2),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(rank=1, size=2, local_rank=0, num_nodes=1)),
        ({"WORLD_SIZE": "2", "OTHER": "x"}, World(rank=0, size=2, local_rank=0, num_nodes=1)),
    ],
)
def test_world_is_read_from_the_environment(environment: dict[str, str], world: World) -> None:
    assert World.from_environment(environment) == world


@pytest.mark.parametrize(("rank", "is_writer"), [(0, True), (1, False), (7, False)])
def test_first_worker_is_the_writer(rank: int, is_writer: bool) -> None:
    assert World(rank=rank, size=8).is_writer is is_writer


def test_group_of_one_needs_nobody() -> None:
    group = Group(World(), dist.HashStore(), timedelta(seconds=60))

    group.barrier()

    assert group.broadcast(b"data") == b"data"
    assert group.sum_(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("gpus", "trouble"),
    [
        (["a 1", "", "a 2"], "worker 1 has no GPU"),
        (["a 1", "a 1"], "workers 0 and 1 share a GPU"),
        (["b 1", "a 1", "a 2", "a 1"], "workers 1 and 3 share a GPU"),
    ],
)
def test_workers_without_a_gpu_of_their_own_are_named(gpus: list[str], trouble: str) -> None:
    assert why_not_nccl(gpus) == trouble


def test_workers_with_gpus_of_their_own_need_nothing_but_nccl() -> None:
    assert "GPU" not in why_not_nccl(["a 1", "a 2", "b 1"])


# -- the name of a launch --------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", ["job-17", "8f2a", "None", "0"])
def test_id_that_a_person_gave_names_the_launch(run_id: str) -> None:
    assert launch_id({"TORCHELASTIC_RUN_ID": run_id}) == run_id


@pytest.mark.parametrize("environment", [{"TORCHELASTIC_RUN_ID": "none"}, {}])
def test_launch_without_an_id_keeps_its_name(environment: dict[str, str]) -> None:
    assert launch_id(environment) == launch_id(environment)


def test_launch_without_an_id_is_named_by_its_agent() -> None:
    name = launch_id({"TORCHELASTIC_RUN_ID": "none"})

    assert name.startswith(f"{os.getppid()}-")


@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": ""}])
def test_launch_without_torchrun_is_named_by_the_process(environment: dict[str, str]) -> None:
    assert launch_id(environment).startswith(f"{os.getpid()}-")


def test_launch_name_holds_when_the_process_began() -> None:
    number = launch_id({}).split("-")[1]

    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    assert number in fields
    assert int(number) > 0


def test_worker_names_its_launch_by_the_agent_and_not_by_itself() -> None:
    agent = launch_id({})  # this process is the parent of the worker
    command = [sys.executable, "-c", PRINT_LAUNCH_ID]

    worker = subprocess.check_output(command, cwd=ROOT, text=True)

    assert worker == agent


# -- the name of a group ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_workers_agree_in_a_fresh_store(store: dist.Store, size: int) -> None:
    prefixes = agree(store, size)

    assert len(prefixes) == size
    assert len(set(prefixes)) == 1
    assert prefixes[0].startswith("trm_dist/group/")


def test_lonely_worker_agrees_with_itself(store: dist.Store) -> None:
    (prefix,) = agree(store, 1)

    assert prefix.startswith("trm_dist/group/")


@pytest.mark.parametrize("late", [0, 1, 2])
def test_workers_agree_when_one_comes_late(store: dist.Store, late: int) -> None:
    assert len(set(agree(store, 3, late=late))) == 1


@pytest.mark.parametrize("num_dead", [1, 2, 3, 5])
@pytest.mark.parametrize("late", [0, 2])
def test_workers_agree_over_leftovers_of_a_dead_group(
    store: dist.Store, num_dead: int, late: int
) -> None:
    dead = [f"dead{rank}" for rank in range(num_dead)]
    die_in_the_middle(store, dead, num_accepted=num_dead - 1)

    prefixes = agree(store, 3, late=late)

    assert len(set(prefixes)) == 1
    assert "dead" not in prefixes[0]


@pytest.mark.parametrize("late", [0, 2])
def test_workers_agree_over_leftovers_without_an_offer(store: dist.Store, late: int) -> None:
    for rank in range(3):
        store.set(f"trm_dist/word/{rank}", f"dead{rank}")

    assert len(set(agree(store, 3, late=late))) == 1


def test_workers_agree_over_leftovers_half_accepted(store: dist.Store) -> None:
    die_in_the_middle(store, ["dead0", "dead1", "dead2"], num_accepted=1)

    prefixes = agree(store, 3, late=0)

    assert len(set(prefixes)) == 1
    assert "dead" not in prefixes[0]


def test_every_start_of_a_group_has_a_name_of_its_own(store: dist.Store) -> None:
    generations = [agree(store, 3, late=number % 9) for number in range(20)]

    assert all(len(set(prefixes)) == 1 for prefixes in generations)
    assert len({prefixes[0] for prefixes in generations}) == 20


def test_groups_of_changing_size_have_names_of_their_own(store: dist.Store) -> None:
    generations = [agree(store, size) for size in (3, 2, 4, 1, 2, 3)]

    assert all(len(set(prefixes)) == 1 for prefixes in generations)
    assert len({prefixes[0] for prefixes in generations}) == 6
