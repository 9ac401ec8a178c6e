"""Kill anything, at any time: the run goes on and ends with the same bits."""

import random
import signal
from pathlib import Path

import pytest

from tests.elastic.harness import (
    DEADLINE_S,
    Training,
    Undisturbed,
    children,
    kill,
    kill_all,
    training,
    wait_until_gone,
)
from trm_dist.cli import main


def assert_same_bits(runs: list[Training], undisturbed: Undisturbed) -> None:
    seen: dict[int, set[str]] = {}
    for run in runs:
        for batch, losses in run.losses().items():
            seen.setdefault(batch, set()).update(losses)
    # A worker that is killed between the snapshot of a batch and its line has finished the batch.
    begun = {each["batch_count"] for run in runs for each in run.events("started")}
    assert undisturbed.losses.keys() - seen.keys() <= begun
    assert seen.items() <= undisturbed.losses.items()
    assert runs[-1].digest() == undisturbed.digest


# The undisturbed run itself has two workers.
@pytest.mark.parametrize(
    "workers", [0, *(pytest.param(size, marks=pytest.mark.soak) for size in (1, 3))]
)
def test_digest_is_the_same_at_every_world_size(
    directory: Path, undisturbed: Undisturbed, workers: int
) -> None:
    with training(directory, workers=workers) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)


@pytest.mark.soak
def test_workers_beyond_the_shards_keep_pace_and_change_nothing(directory: Path) -> None:
    flags = {"--batch-size": "8", "--shards": "2", "--epochs": "1"}
    digests = set()
    for workers in (1, 3):
        where = directory / str(workers)
        where.mkdir(parents=True)
        with training(where / "checkpoints", workers=workers, flags=flags) as run:
            assert run.end() == 0, run.messages()
            digests.add(run.digest())
    assert len(digests) == 1
    assert "1 of them only keep pace" in run.messages()


@pytest.mark.timeout(600)
@pytest.mark.soak
@pytest.mark.parametrize("count", [5, 20])
def test_many_kills_of_workers_in_one_run_change_nothing(
    directory: Path, undisturbed: Undisturbed, count: int
) -> None:
    chance = random.Random(count)
    with training(directory, workers=2, max_restarts=30, flags={"--latest-every-s": "0"}) as run:
        for number in range(count):
            run.wait_for_start(number + 1)
            run.wait_for_batches(chance.randint(1, 3))
            kill(run.worker(chance.randint(0, 1)))
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert len(run.events("started")) == count + 1


def test_worker_killed_while_the_group_forms_is_replaced(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, workers=2, max_restarts=30) as run:
        for rank in (1, 0, 1):
            first = run.worker(rank)
            kill(first)
            run.wait_for(lambda first=first: first not in children(run.process.pid), "its end")
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
def test_everything_killed_again_and_again_changes_nothing(
    directory: Path, undisturbed: Undisturbed, workers: int
) -> None:
    chance, runs = random.Random(workers), []
    for _ in range(4):
        with training(directory, workers=workers) as run:
            run.wait_for_batches(chance.randint(6, 15))
            kill_all(run)
            runs.append(run)
    with training(directory, workers=workers) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([*runs, run], undisturbed)


def test_torchrun_killed_takes_its_workers_along(directory: Path, undisturbed: Undisturbed) -> None:
    # Too long to end by itself while the test waits for its workers to be gone.
    with training(directory, workers=2, flags={"--epochs": "1000"}) as first:
        first.wait_for_batches(12)
        workers = children(first.process.pid)
        kill(first.process.pid)
        first.process.wait(DEADLINE_S)
        wait_until_gone(workers)
    with training(directory, workers=2) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)


@pytest.mark.soak
def test_kills_in_the_middle_of_a_save_change_nothing(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "1"}
    hidden, hits = directory / ".trm_dist", 0
    with training(directory, workers=2, max_restarts=30, flags=flags) as run:
        for number in range(6):
            run.wait_for_batches(3 + number)
            victims = [run.persister(), *([run.worker(0)] if number % 3 == 2 else [])]
            while not any(each.name.startswith("tmp-") for each in hidden.iterdir()):
                assert run.process.poll() is None
            for victim in victims:
                kill(victim)
            wait_until_gone(victims)
            # The next writer removes it: what is left now was torn by the kill.
            hits += any(each.name.startswith("tmp-") for each in hidden.iterdir())
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert main(["verify", str(directory)]) == 0
    assert hits, "no kill fell inside a save"


@pytest.mark.soak
def test_world_size_may_change_at_every_restart(directory: Path, undisturbed: Undisturbed) -> None:
    runs = []
    for workers in (3, 1, 2):
        with training(directory, workers=workers) as run:
            run.wait_for_batches(15)
            run.process.send_signal(signal.SIGTERM)
            assert run.end() != 0
            runs.append(run)
    with training(directory) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([*runs, run], undisturbed)
