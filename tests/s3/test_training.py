"""Training whose checkpoints lie in S3: killed, cut off from its server, stopped, taken over."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.curves import assert_each_batch_is_one_point, points_of
from tests.elastic.harness import (
    SMALL,
    Undisturbed,
    as_arguments,
    forget_snapshots,
    kill,
    kill_everything,
    started,
    training,
)
from tests.elastic.test_kill import assert_same_bits
from tests.elastic.test_memory import NO_COMMITS, assert_same_beginning, told_twice
from tests.s3.proxy import Proxy
from tests.s3.server import Server
from trm_dist.checkpoint.catalog import read_summary
from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.runs import read_run
from trm_dist.checkpoint.store import open_store
from trm_dist.checkpoint.tfevents import EventFiles
from trm_dist.cli import main


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the output of trainings goes."""
    return tmp_path / "x"


def points_in(url: str) -> dict[str, list[Any]]:
    """The points of the event files that lie beside the checkpoints, read where they lie."""
    store = open_store(url)
    run = read_run(store)
    assert run is not None
    return points_of(f"{url}/{EventFiles(store, run).folder}/train")


def committed(url: str) -> int:
    summary = read_summary(open_store(url), LATEST)
    return int(summary["batch_count"]) if summary else 0


def test_run_in_s3_that_is_killed_and_killed_ends_with_the_same_bits(
    place: Path, url: str, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--checkpoint-dir": url, "--tensorboard": ""}
    with training(place, workers=2, max_restarts=5, flags=flags) as first:
        for number, victim in enumerate((0, 1)):
            first.wait_for_start(number + 1)
            first.wait_for_batches(6)
            kill(first.worker(victim))
        first.wait_for_start(3)
        first.wait_for_batches(6)
        kill_everything(first)
    forget_snapshots()  # now the bucket is all there is
    with training(place, workers=3, flags=flags) as last:
        assert last.end() == 0, last.messages()
        assert last.events("started")[0]["source"].startswith(url)
        assert told_twice(first) == []
        assert_same_bits([first, last], undisturbed)
        told = first.events("batch") + last.events("batch")
    assert_each_batch_is_one_point(points_in(url), told)
    assert main(["verify", url]) == 0
    capsys.readouterr()
    assert main(["ls", url, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["batch_count"] for each in listed][-1] == 80
    assert len(listed) == 80 // 7 + 2
    assert main(["prune", url, "--keep-last", "2", "--multipart"]) == 0
    assert main(["inspect", url, "--digest"]) == 0
    assert undisturbed.digest in capsys.readouterr().out


def test_server_that_dies_and_comes_back_costs_time_and_nothing_else(
    place: Path, url: str, server: Server, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-dir": url, "--checkpoint-interval": "2", "--tensorboard": ""}
    with training(place, workers=2, flags=flags) as run:
        run.wait_for_batches(5)
        server.kill()
        before = run.told()
        run.wait_for(lambda: run.told() > before, "training to go on without its server")
        server.start()
        assert run.end() == 0, run.messages()
        assert len(run.events("started")) == 1
        assert_same_bits([run], undisturbed)
        told = run.events("batch")
    assert main(["verify", url]) == 0
    assert len(open_store(url).entries()) == 42
    assert_each_batch_is_one_point(points_in(url), told)


def test_restart_while_the_server_is_away_waits_for_it(
    place: Path, url: str, server: Server, undisturbed: Undisturbed
) -> None:
    flags = NO_COMMITS | {"--checkpoint-dir": url}
    with training(place, workers=2, max_restarts=1, flags=flags) as run:
        run.wait_for_batches(9)
        server.kill()
        kill(run.worker(0))
        time.sleep(8)  # the new workers are there by then, and ask in vain
        assert run.process.poll() is None, run.messages()
        assert len(run.events("started")) == 1
        server.start()
        assert run.end() == 0, run.messages()
        assert [each["source"] for each in run.events("started")[1:]] == ["memory"]
        assert told_twice(run) == []
        assert_same_bits([run], undisturbed)


def test_persister_killed_while_the_server_is_away_does_not_stop_training(
    place: Path, url: str, server: Server, undisturbed: Undisturbed
) -> None:
    flags = NO_COMMITS | {"--checkpoint-dir": url, "--hang-timeout": "20"}
    with training(place, workers=2, flags=flags) as run:
        run.wait_for_batches(5)
        server.kill()
        kill(run.persister())
        run.wait_for_batches(9)
        server.start()
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert main(["verify", url]) == 0


def test_launch_on_a_new_node_waits_for_a_server_that_is_away(
    place: Path, url: str, server: Server, undisturbed: Undisturbed
) -> None:
    server.kill()
    with training(place, launch=2, flags={"--checkpoint-dir": url}) as run:
        run.wait_for(lambda: "Trying again" in run.messages(), "a try in vain")
        server.start()
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)


def test_trainer_on_another_node_takes_over_and_the_older_one_stops_for_good(
    place: Path, url: str, proxy: Proxy, undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = {"--checkpoint-dir": url, "--checkpoint-interval": "1", "--epochs": "1000"}
    with training(place, workers=2, max_restarts=20, flags=flags) as older:
        older.wait_for_batches(8)
        # Another endpoint is another store to this machine: a persister and memory of its own.
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with training(place, flags=flags) as newer:
            newer.wait_for_batches(3)
            assert older.end() != 0
            newer.wait_for_batches(3)
            kill(newer.process.pid, signal.SIGTERM)
            assert newer.end() == 143, newer.messages()
            assert_same_beginning([older, newer], undisturbed)
    assert older.messages().count("another writer has taken over") == 1
    assert len(older.events("started")) == 1
    assert main(["verify", url]) == 0


def test_stop_of_process_1_with_a_slow_store_commits_the_newest_state(
    place: Path, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process 1 of its own needs root")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    flags = as_arguments(SMALL | NO_COMMITS | {"--checkpoint-dir": url, "--epochs": "100"})
    command = [*alone, *torchrun, "-m", "trm_dist", "train", *flags]
    with started(place, command) as run:
        run.wait_for_batches(9)
        proxy.meanwhile("PUT .*checkpoint_latest", lambda: time.sleep(3))
        (process_1,) = [pid for pid in run.processes() if is_torchrun(pid)]
        kill(process_1, signal.SIGTERM)
        assert run.end() != 0
        told = run.told()
    assert committed(url) >= told


def is_torchrun(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_text()
    return "torch.distributed.run" in command and not command.startswith("unshare")


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({}, "s3://no-such-bucket/run", "does not exist"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "", "cannot be"),
        ({}, "s3://", "names no bucket"),
    ],
    ids=["bucket", "secret", "no bucket"],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_store_that_cannot_be_used_is_told_before_training(
    url: str, command: str, changes: dict[str, str], where: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    flags = SMALL | {"--checkpoint-dir": where or url}
    assert main([command, *as_arguments(flags)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("trm_dist:") == 1
