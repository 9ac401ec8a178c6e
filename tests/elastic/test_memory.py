"""Memory outlives the workers: whatever is killed, nothing that was finished is done again."""

import fcntl
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.elastic.harness import (
    SMALL,
    SNAPSHOTS,
    Training,
    Undisturbed,
    as_arguments,
    forget_snapshots,
    kill,
    kill_everything,
    resize,
    small_file_system,
    started,
    training,
    wait_until_gone,
)
from tests.elastic.test_kill import assert_same_bits
from trm_dist.checkpoint.catalog import read_summary
from trm_dist.checkpoint.names import LATEST, epoch_name
from trm_dist.checkpoint.store import LocalStore
from trm_dist.cli import main

# Nothing is committed before the end, so whatever survives a kill survives in memory.
NO_COMMITS = {"--checkpoint-interval": "100000", "--latest-every-s": "100000"}


def told_twice(*runs: Training) -> list[int]:
    told = [each["batch_count"] for run in runs for each in run.events("batch")]
    return sorted({count for count in told if told.count(count) > 1})


def committed(directory: Path) -> int:
    summary = read_summary(LocalStore(str(directory)), LATEST)
    return int(summary["batch_count"]) if summary else 0


def snapshot_files() -> list[str]:
    return os.listdir(SNAPSHOTS)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no file of a store be moved into place: a store that takes its time."""
    with (directory / ".trm_dist" / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_worker_costs_no_finished_batch(
    directory: Path, undisturbed: Undisturbed, victim: int
) -> None:
    with training(directory, workers=2, max_restarts=9, flags=NO_COMMITS) as run:
        for number in range(3):
            run.wait_for_start(number + 1)
            run.wait_for_batches(5)
            kill(run.worker(victim))
        assert run.end() == 0, run.messages()
        assert told_twice(run) == []
        assert {each["source"] for each in run.events("started")[1:]} == {"memory"}
        assert_same_bits([run], undisturbed)


@pytest.mark.soak
def test_everything_killed_goes_on_from_memory(directory: Path, undisturbed: Undisturbed) -> None:
    runs = []
    with ExitStack() as stack:
        for workers in (2, 1, 3):
            run = stack.enter_context(training(directory, workers=workers, flags=NO_COMMITS))
            runs.append(run)
            run.wait_for_batches(9)
            kill_everything(run)
            assert committed(directory) == 0
        last = stack.enter_context(training(directory))
        assert last.end() == 0, last.messages()
        runs.append(last)
        assert told_twice(*runs) == []
        assert_same_bits(runs, undisturbed)
    assert snapshot_files() == []


def test_memory_of_a_directory_that_was_emptied_is_not_gone_on_with(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, flags=NO_COMMITS) as first:
        first.wait_for_batches(9)
        kill_everything(first)
    assert len(snapshot_files()) == 1
    shutil.rmtree(directory)

    with training(directory) as second:
        assert second.end() == 0, second.messages()

    started = second.events("started")[0]
    assert (started["source"], started["batch_count"]) == ("", 0)
    assert_same_bits([second], undisturbed)


def test_restarted_worker_goes_on_from_memory_though_the_directory_was_emptied(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, workers=1, max_restarts=1, flags=NO_COMMITS) as run:
        run.wait_for_batches(9)
        worker, persister = run.worker(0), run.persister()
        for pid in (worker, persister):  # so that the one cannot do anything about the other's end
            kill(pid, signal.SIGSTOP)
        shutil.rmtree(directory)
        for pid in (persister, worker):
            kill(pid)
        assert run.end() == 0, run.messages()
    assert [each["source"] for each in run.events("started")] == ["", "memory"]
    assert told_twice(run) == []
    assert_same_bits([run], undisturbed)


def test_persister_saves_what_a_killed_trainer_has_left(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, flags=NO_COMMITS) as first:
        first.wait_for_batches(9)
        persister = first.persister()
        kill(first.process.pid)
        wait_until_gone([persister])
        assert committed(directory) >= first.told()
        assert snapshot_files() == []
        with training(directory, flags=NO_COMMITS) as second:
            assert second.end() == 0, second.messages()
            assert second.events("started")[0]["source"].endswith(LATEST)
            assert told_twice(first, second) == []
            assert_same_bits([first, second], undisturbed)


@pytest.mark.soak
def test_persister_killed_again_and_again_is_replaced(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "1"}
    with training(directory, workers=2, flags=flags) as run:
        for _ in range(6):
            run.wait_for_batches(4)
            kill(run.persister())
        assert run.end() == 0, run.messages()
        assert len(run.events("started")) == 1
        assert_same_bits([run], undisturbed)
    names = {each.name for each in directory.glob("checkpoint_epoch_*")}
    assert names == {epoch_name(1 + k // 10, 1 + k % 10) for k in range(80)}
    assert main(["verify", str(directory)]) == 0


@pytest.mark.timeout(600)
def test_worker_and_persister_killed_together_cost_no_batch(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "3"}
    with training(directory, workers=2, max_restarts=9, flags=flags) as run:
        for number in range(2):
            run.wait_for_start(number + 1)
            run.wait_for_batches(5)
            for pid in (run.persister(), run.worker(0)):
                kill(pid)
        assert run.end() == 0, run.messages()
        assert told_twice(run) == []
        assert_same_bits([run], undisturbed)
        told = {name for each in run.events("committed") for name in each["names"]}
    assert told <= {each.name for each in directory.iterdir()}
    assert len(list(directory.glob("checkpoint_epoch_*"))) == 80 // 3
    assert main(["verify", str(directory)]) == 0


def test_a_name_that_nobody_could_give_any_more_is_given_by_the_next_start(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "6"}
    with training(directory, workers=2, max_restarts=9, flags=flags) as run:
        run.wait_for_batches(8)
        kill(run.persister(), signal.SIGSTOP)  # it gives batch 12 no name
        run.wait_for(lambda: run.told() >= 14, "batch 14")
        for pid in (run.persister(), run.worker(0)):
            kill(pid)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert len(list(directory.glob("checkpoint_epoch_*"))) == 80 // 6
    assert main(["verify", str(directory)]) == 0


def test_a_branch_killed_at_its_begin_leaves_its_origin_as_it_is(directory: Path) -> None:
    flags = {"--checkpoint-interval": "3", "--epochs": "1"}
    with training(directory, flags=flags) as run:
        assert run.end() == 0, run.messages()
    origin = directory / epoch_name(1, 3)
    before = origin.read_bytes()
    branch = flags | {"--resume": str(origin), "--overwrite": "", "--epochs": "2"}
    with training(directory, workers=2, max_restarts=9, flags=branch) as run:
        run.wait_for_batches(1)
        kill(run.worker(0))
        assert run.end() == 0, run.messages()
        assert [each["source"] for each in run.events("started")] == [str(origin), "memory"]
    assert origin.read_bytes() == before


def test_memory_of_another_node_is_taken_when_the_writers_node_is_new(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    memory = [Path(SNAPSHOTS) / "node0", Path(SNAPSHOTS) / "node1"]
    for each in memory:
        each.mkdir()
    try:
        first = two_nodes(tmp_path, memory, until_batch=12)
        forget_snapshots(str(memory[0]))
        second = two_nodes(tmp_path, memory)
    finally:
        for each in memory:
            forget_snapshots(str(each))
            each.rmdir()
    assert second.events("started")[0]["source"] == "memory of worker 1"
    assert told_twice(first, second) == []
    assert_same_bits([first, second], undisturbed)


def two_nodes(tmp_path: Path, memory: list[Path], until_batch: int = 0) -> Training:
    """Train on two agents until everything is killed, or to the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        nodes = []
        for node in (0, 1):
            flags = SMALL | NO_COMMITS
            flags |= {"--checkpoint-dir": str(tmp_path / "c"), "--snapshot-dir": str(memory[node])}
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                f"--node-rank={node}",
                "--nproc-per-node=1",
            ]
            command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "trm_dist"]
            place = tmp_path / f"node{node}-{until_batch}" / "x"
            place.parent.mkdir()
            wanted = [*command, "train", *as_arguments(flags)]
            nodes.append(stack.enter_context(started(place, wanted)))
        if until_batch:
            nodes[0].wait_for_batches(until_batch)
            for node in nodes:
                kill_everything(node)
        else:
            assert [node.end() for node in nodes] == [0, 0], nodes[0].messages()
        return nodes[0]


# -- two at once -----------------------------------------------------------------------------------


@pytest.mark.soak
def test_newer_trainer_takes_over_and_the_older_one_stops_for_good(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "1", "--epochs": "1000"}
    with training(directory, workers=2, max_restarts=20, flags=flags) as older:
        older.wait_for_batches(8)
        with training(directory, workers=1, flags=flags) as newer:
            newer.wait_for_batches(3)
            assert older.end() != 0
            newer.wait_for_batches(3)
            kill(newer.process.pid, signal.SIGTERM)
            assert newer.end() != 0
            assert newer.events("started")[0]["batch_count"] >= 8
            assert_same_beginning([older, newer], undisturbed)
    assert older.messages().count("has taken over") == 1
    assert len(older.events("started")) == 1
    assert committed(directory) >= newer.told()
    assert main(["verify", str(directory)]) == 0


def assert_same_beginning(runs: list[Training], undisturbed: Undisturbed) -> None:
    """Compare the losses of a longer run with those the undisturbed one has."""
    for run in runs:
        for batch, losses in run.losses().items():
            assert undisturbed.losses.get(batch, losses) == losses


# -- a store that takes its time -------------------------------------------------------------------


@pytest.mark.soak
def test_crashes_more_frequent_than_publishes_still_get_one_committed(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, max_restarts=9, workers=2) as run:
        run.wait_for_batches(2)
        with locked(directory):
            run.wait_for(lambda: run.told() >= 14, "two checkpoints that are due")
            for number in range(2):
                kill(run.worker(0))
                run.wait_for_start(number + 2)
            assert not (directory / epoch_name(1, 7)).exists()
        assert run.end() == 0, run.messages()
        assert told_twice(run) == []
        assert_same_bits([run], undisturbed)
    assert (directory / epoch_name(1, 7)).exists()
    assert (directory / epoch_name(2, 4)).exists()


def test_slow_store_costs_measured_waiting_and_no_memory(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "1", "--epochs": "8"}
    with training(directory, flags=flags) as run:
        run.wait_for_batches(2)
        persister = run.persister()
        for _ in range(8):
            with locked(directory):
                time.sleep(0.3)
            run.wait_for_batches(2)
        peak = Path(f"/proc/{persister}/status").read_text().split("VmHWM:")[1].split()[0]
        assert len(snapshot_files()) == 1
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert sum(each["waited_s"] for each in run.events("committed")) > 1
    assert len(list(directory.glob("checkpoint_epoch_*"))) == 80
    assert int(peak) < 100_000, "kB"


def test_stop_with_a_store_that_hangs_ends_with_the_grace_period_and_loses_nothing(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = NO_COMMITS | {"--grace-period": "1.5"}
    with training(directory, flags=flags) as first:
        first.wait_for_batches(9)
        persister = first.persister()
        with locked(directory):
            kill(first.process.pid, signal.SIGTERM)
            assert first.end() == 143
            assert "not committed after --grace-period" in first.messages()
            assert committed(directory) == 0
        wait_until_gone([persister])
        assert committed(directory) >= first.told()
    with training(directory) as second:
        assert second.end() == 0, second.messages()
        assert told_twice(first, second) == []
        assert_same_bits([first, second], undisturbed)


def test_stop_waits_for_a_store_that_is_slow(directory: Path) -> None:
    with training(directory, workers=2, flags=NO_COMMITS) as run:
        run.wait_for_batches(9)
        with locked(directory):
            kill(run.process.pid, signal.SIGTERM)
            time.sleep(1)
            assert run.process.poll() is None
        assert run.end() != 0
        assert committed(directory) >= run.told()
        assert run.processes() == []
    assert snapshot_files() == []


# -- memory that is short --------------------------------------------------------------------------


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A memory file system whose size a test sets."""
    with small_file_system(tmp_path / "memory", "1m") as mount:
        yield mount


@pytest.mark.parametrize(
    ("size", "message"),
    [
        pytest.param("640k", "only 2 of 3 memory snapshots", marks=pytest.mark.soak),
        pytest.param("100k", "not even two memory snapshots", marks=pytest.mark.soak),
    ],
)
def test_memory_that_is_too_small_is_told_and_fewer_snapshots_are_kept(
    directory: Path, undisturbed: Undisturbed, small_memory: Path, size: str, message: str
) -> None:
    resize(small_memory, size)
    flags = {"--snapshot-dir": str(small_memory), "--checkpoint-interval": "1"}
    with training(directory, workers=2, flags=flags) as run:
        run.wait_for_batches(9)
        kill_everything(run)
        if "2 of 3" in message:
            assert len(os.listdir(small_memory)) == 1
    with training(directory, workers=2, flags=flags) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([run, second], undisturbed)
    assert run.messages().count(message) == 1
    assert os.listdir(small_memory) == []


def test_memory_that_fills_up_in_mid_run_hurts_nobody(
    directory: Path, undisturbed: Undisturbed, small_memory: Path
) -> None:
    with training(directory, flags={"--snapshot-dir": str(small_memory)}) as run:
        run.wait_for_batches(3)
        with pytest.raises(OSError, match="No space"), (small_memory / "other").open("wb") as file:
            file.write(bytes(2 << 20))
        run.wait_for_batches(3)
        kill_everything(run)
        with training(directory, flags={"--snapshot-dir": str(small_memory)}) as second:
            assert second.end() == 0, second.messages()
            assert second.events("started")[0]["source"] == "memory"
            assert_same_bits([run, second], undisturbed)


@pytest.mark.parametrize("where", ["missing", "file"])
def test_snapshot_dir_that_cannot_be_used_is_told_and_training_goes_on(
    directory: Path, tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").write_text("")
    flags = {"--snapshot-dir": str(tmp_path / where), "--epochs": "1"}
    with training(directory, flags=flags) as run:
        assert run.end() == 0, run.messages()
    assert "not even two memory snapshots" in run.messages()


def test_limit_on_file_sizes_that_forbids_them_is_told_once(directory: Path) -> None:
    with training(directory, launch=1) as run:
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
        assert run.end() == 2, run.messages()
    assert run.messages().count("Raise that limit (ulimit -f)") == 1
    assert "Traceback" not in run.messages()


def test_snapshots_are_private_and_gone_at_the_end(directory: Path) -> None:
    with training(directory, workers=2, flags={"--epochs": "1"}) as run:
        run.wait_for(snapshot_files, "a snapshot")
        modes = {os.stat(f"{SNAPSHOTS}/{name}").st_mode & 0o777 for name in snapshot_files()}
        assert run.end() == 0, run.messages()
    assert modes == {0o600}
    assert snapshot_files() == []


@pytest.mark.soak
@pytest.mark.parametrize("every", ["4", "auto"])
def test_fewer_snapshots_cost_what_they_say(
    directory: Path, undisturbed: Undisturbed, every: str
) -> None:
    flags = NO_COMMITS | {"--snapshot-every": every}
    with training(directory, workers=2, max_restarts=3, flags=flags) as run:
        run.wait_for_batches(21)
        kill(run.worker(1))
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    resumed = run.events("started")[1]["batch_count"]
    if every == "4":
        assert resumed % 4 == 0
        assert len(told_twice(run)) < 4
    else:
        assert "a memory snapshot takes" in run.messages()
