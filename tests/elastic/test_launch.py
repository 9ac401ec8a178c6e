"""`trm_dist launch`: whatever is killed of it, it goes on by itself, or says why it does not."""

import json
import os
import random
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.elastic.harness import (
    SMALL,
    SNAPSHOTS,
    Training,
    Undisturbed,
    kill,
    training,
    wait_until_gone,
)
from tests.elastic.test_kill import assert_same_bits

SLOW_BASE = SMALL | {
    "--dataset": "sudoku4:train?count=400",
    "--dim": "256",
    "--n-sup": "16",
    "--batch-size": "40",
    "--l-cycles": "6",
    "--epochs": "1",
}
"""Batches of many seconds."""


def read_record(directory: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((directory / ".trm_dist" / "run.json").read_text())
    return record


def wait_for_record(run: Training, directory: Path, generation: int) -> None:
    """Wait until a writer has started so many times."""

    def is_there() -> bool:
        path = directory / ".trm_dist" / "run.json"
        return path.exists() and json.loads(path.read_text())["generation"] >= generation

    run.wait_for(is_there, f"generation {generation}")


def test_run_finishes_with_the_same_bits_and_leaves_nothing(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, launch=2) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
        wait_until_gone(run.processes())
    assert not [each for each in Path(SNAPSHOTS).iterdir() if each.is_file()]


@pytest.mark.parametrize(
    "victims",
    [
        ["trm worker 0", "trm worker 1", "stub.py", "trm worker 1", "trm worker 0", "trm agent"],
        ["zygote", "trm worker 0", "trm_dist.checkpoint.persister"],
    ],
)
def test_whatever_is_killed_the_run_goes_on(
    directory: Path, undisturbed: Undisturbed, victims: list[str]
) -> None:
    with training(directory, launch=2) as run:
        for number, victim in enumerate(victims, 1):
            run.wait_for_batches(4)
            kill(run.named(victim))
            if "persister" not in victim:
                run.wait_for_start(number + 1)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)


def test_killed_supervisor_takes_everything_along_and_the_next_one_goes_on(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, launch=2) as first:
        first.wait_for_batches(9)
        kill(first.process.pid)
        first.end()
        wait_until_gone(first.processes())  # the persister ends when all is committed
    with training(directory, launch=2) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)
    assert not first.losses().keys() & second.losses().keys()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_saves_what_is_finished_and_says_so(
    directory: Path, undisturbed: Undisturbed, signum: int, code: int
) -> None:
    with training(directory, launch=2, flags={"--checkpoint-interval": "1000"}) as first:
        first.wait_for_batches(9)
        first.process.send_signal(signum)
        assert first.end() == code, first.messages()
        told = first.told()
        assert torch.load(directory / "checkpoint_latest.pt")["batch_count"] >= told
        wait_until_gone(first.processes())
    with training(directory, launch=2) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)


@pytest.mark.parametrize("steps", ["16", pytest.param("96", marks=pytest.mark.soak)])
def test_stop_within_the_grace_period_does_not_wait_for_a_long_batch(
    directory: Path, steps: str
) -> None:
    flags = {"--grace-period": "5", "--n-sup": steps, "--log-format": "json"}
    with training(directory, launch=2, base=SLOW_BASE, flags=flags) as run:
        run.wait_for_batches(1)
        print(f"a batch takes {run.events('batch')[0]['seconds']:.1f} s")  # noqa: T201
        time.sleep(0.5)  # in the middle of the next one
        told = run.told()
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143, run.messages()
        assert run.told() == told
        assert torch.load(directory / "checkpoint_latest.pt")["batch_count"] == told


def test_second_ctrl_c_leaves_at_once(directory: Path) -> None:
    flags = {"--checkpoint-dir": f"{directory}", "--grace-period": "200"}
    with training(directory, launch=2, flags=flags) as run:
        run.wait_for_batches(9)
        kill(run.named("trm_dist.checkpoint.persister"), signal.SIGSTOP)  # a store that hangs
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert run.process.poll() is None, "it waits for the store"
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130


def test_signal_to_one_worker_restarts_the_group(directory: Path, undisturbed: Undisturbed) -> None:
    with training(directory, launch=2) as run:
        run.wait_for_batches(9)
        kill(run.named("trm worker 1"), signal.SIGTERM)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert "worker 1 was told to stop" in run.messages()


def test_environment_may_be_larger_than_a_message(
    directory: Path, undisturbed: Undisturbed
) -> None:
    large = {f"TESTED_{number}": "x" * 100_000 for number in range(5)}
    with training(directory, launch=2, variables=large) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)


def test_wrong_usage_is_told_once_and_never_retried(directory: Path) -> None:
    with training(directory, launch=2, flags={"--batch-size": "3000"}) as run:
        assert run.end() == 2
    assert run.messages().count("is larger than the data") == 1


def test_unknown_flag_is_told_before_anything_starts(directory: Path) -> None:
    with training(directory, launch=2, flags={"--batch-sice": "3"}) as run:
        assert run.end() == 2
    assert run.messages().count("Perhaps you meant") == 1


def test_failure_that_would_come_again_ends_the_run(directory: Path) -> None:
    with training(directory, launch=2, flags={"--lr": "1e30", "--warmup-steps": "0"}) as run:
        assert run.end() == 1
    assert run.messages().count("samples: [") == 1
    assert run.events("started")
    assert len(run.events("started")) == 1


def test_worker_that_fails_again_and_again_ends_the_run_with_the_cause(directory: Path) -> None:
    flags = {"--max-no-progress": "2"}
    with training(directory, launch=2, base=SLOW_BASE, flags=flags) as run:
        for start in (1, 2):
            run.wait_for_start(start)
            kill(run.named("trm worker 1"), signal.SIGSEGV)
        assert run.end() == 1, run.messages()
        last = run.messages().strip().splitlines()[-1]
        assert "the cause: worker 1: killed by SIGSEGV" in last
    assert len(run.events("started")) == 2


def test_zygote_that_never_gets_ready_ends_the_run(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('no such library')")
    flags = {"--max-no-progress": "3"}
    path = os.pathsep.join(filter(None, [str(tmp_path / "broken"), os.environ.get("PYTHONPATH")]))
    with training(directory, launch=2, flags=flags, variables={"PYTHONPATH": path}) as run:
        assert run.end() == 1
    assert run.messages().count("ImportError: no such library") == 3
    assert "gave up: started 3 times" in run.messages().splitlines()[-1]


def test_worker_that_fails_again_and_again_ends_torchrun(directory: Path) -> None:
    flags = {"--max-no-progress": "2"}
    with training(directory, workers=1, max_restarts=20, base=SLOW_BASE, flags=flags) as run:
        for start in (1, 2):
            run.wait_for_start(start)
            kill(run.worker(0), signal.SIGSEGV)
        assert run.end() == 1, run.messages()
    assert len(run.events("started")) == 2
    assert "failed 2 times in a row after batch 0" in run.errors.read_text()


@pytest.mark.soak  # within one launch: the two tests before
@pytest.mark.parametrize("launch", [0, 1])
def test_failures_count_over_launches_and_preemptions_do_not(directory: Path, launch: int) -> None:
    def start(signum: int, *, flags: dict[str, str]) -> tuple[int, str]:
        with training(directory, launch=launch, base=SLOW_BASE, flags=flags) as run:
            generation = read_record(directory)["generation"] if directory.exists() else 0
            assert isinstance(generation, int)
            run.wait_for_start(1)
            victim = run.named("trm worker 0") if launch else run.process.pid
            if signum == signal.SIGKILL:
                kill(run.process.pid)
                kill(victim)
            else:
                run.process.send_signal(signum)
            code = run.end()
            wait_until_gone(run.processes())
            return code, run.messages()

    limits = {"--max-no-progress": "2", "--max-preemptions": "3"}
    start(signal.SIGKILL, flags=limits)
    for _ in range(2):
        code, _ = start(signal.SIGTERM, flags=limits)
        assert code == 143
    assert read_record(directory)["failures"] == 1
    start(signal.SIGKILL, flags=limits)
    assert read_record(directory)["preemptions"] == 2
    with training(directory, launch=launch, base=SLOW_BASE, flags=limits) as run:
        assert run.end() == 1
    assert "failed 2 times in a row after batch 0" in run.messages()
    with training(
        directory, launch=launch, base=SLOW_BASE, flags={"--max-no-progress": "0"}
    ) as run:
        run.wait_for_start(1)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_stopped_worker_is_found_and_replaced(
    directory: Path, undisturbed: Undisturbed, workers: int
) -> None:
    with training(directory, launch=workers, flags={"--hang-timeout": "2"}) as run:
        run.wait_for_batches(9)
        kill(run.named(f"trm worker {workers - 1}"), signal.SIGSTOP)
        run.wait_for_start(2)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert f"stopped by a signal: worker {workers - 1}" in run.messages()
    if workers > 1:  # the others say where they wait
        assert "in _supervise" in run.messages()


def test_preemption_file_makes_the_node_save_and_leave(
    directory: Path, undisturbed: Undisturbed
) -> None:
    file = directory.parent / "preempted"
    for number, launch in enumerate((2, 0)):
        flags = {"--preemption-file": f"{file}{number}"}
        with training(directory, launch=launch, flags=flags) as run:
            run.wait_for_batches(9)
            Path(flags["--preemption-file"]).touch()
            assert run.end() == 143
        assert f"{file}{number} is there: this node saves and leaves" in run.messages()
    with training(directory) as last:
        assert last.end() == 0
        assert last.digest() == undisturbed.digest


def test_health_is_told_over_http(directory: Path, free_port: int) -> None:
    flags = {"--health-port": str(free_port), "--hang-timeout": "600"}
    url = f"http://127.0.0.1:{free_port}"
    with training(directory, launch=2, flags=flags) as run:
        run.wait_for_batches(3)
        health = json.load(urllib.request.urlopen(f"{url}/healthz"))
        assert health["state"] == "training"
        assert health["workers"] == 2
        assert 0 < health["batch_count"] <= 80
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/")
        assert run.end() == 0


@pytest.mark.soak
def test_workers_are_commands_where_forking_is_not_safe(
    directory: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if 'zygote' in sys.orig_argv:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    variables = {"PYTHONPATH": str(tmp_path)}
    with training(directory, launch=2, variables=variables) as run:
        run.wait_for_batches(9)
        kill(run.process.pid, 0)
        workers = [
            pid
            for pid in run.processes()
            if b"\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        kill(random.choice(workers))
        run.wait_for_start(2)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert "a library has started a thread" in run.messages()


@pytest.mark.parametrize(
    "flags",
    [
        {"--optim": "adam-atan2", "--precision": "bf16"},
        {
            "--dataset": "sudoku9:train?count=9",
            "--eval-dataset": "sudoku9:test?count=3",
            "--augment": "10",
            "--net": "attn",
        },
    ],
)
def test_other_settings_give_one_digest_through_kills_too(
    directory: Path, tmp_path: Path, flags: dict[str, str]
) -> None:
    flags = {"--epochs": "3", **flags}
    with training(tmp_path / "alone", flags=flags) as alone:
        assert alone.end() == 0, alone.messages()
    with training(directory, launch=2, flags=flags) as run:
        run.wait_for_batches(7)
        kill(run.named("trm worker 0"))
        run.wait_for_start(2)
        assert run.end() == 0, run.messages()
    assert run.digest() == alone.digest()
    assert all(run.losses()[batch] == losses for batch, losses in alone.losses().items())


def test_metrics_go_on_after_a_kill(directory: Path, free_port: int) -> None:
    def value(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    flags = {"--metrics-port": str(free_port), "--epochs": "1000"}
    with training(directory, launch=2, flags=flags) as run:
        run.wait_for_batches(5)
        before = value("trm_batch_count")
        assert before >= 5
        kill(run.named("trm worker 0"))
        run.wait_for_start(2)
        run.wait_for_batches(3)
        assert value("trm_batch_count") > before
        assert value("trm_samples_total") < value("trm_samples_seen")
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143


def listening_ports(pid: int) -> set[int]:
    """The TCP ports on which a process listens."""
    links = (os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir())
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                found.add(int(local.rsplit(":", 1)[1], 16))
    return found


def test_killed_agent_leaves_no_port_and_no_worker(directory: Path) -> None:
    with training(directory, launch=2, flags={"--epochs": "1000"}) as run:
        run.wait_for_batches(3)
        agent, workers = run.named("trm agent"), [run.named(f"trm worker {n}") for n in (0, 1)]
        stubs = [
            pid for pid in run.processes() if "stub.py" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        ports = listening_ports(agent)
        assert ports
        kill(agent)
        wait_until_gone([agent, *workers, *stubs])
        for port in ports:
            with socket.create_server(("127.0.0.1", port)):
                pass
        run.wait_for_start(2)


def test_newer_trainer_on_this_node_takes_over_and_the_launch_stops_for_good(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, launch=1) as older:
        older.wait_for_batches(9)
        with training(directory, launch=1) as newer:
            assert newer.end() == 0, newer.messages()
            assert older.end() == 1
            assert_same_bits([older, newer], undisturbed)
    assert older.messages().count("has taken over") == 1
    assert len(older.events("started")) == 1
