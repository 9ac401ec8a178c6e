"""Generations at a real rendezvous process, and what must not happen when it is replaced."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.elastic.harness import Undisturbed, kill, training
from tests.elastic.test_kill import assert_same_bits
from trm_dist.checkpoint.runs import claim, new_writer, read_run
from trm_dist.checkpoint.store import open_store
from trm_dist.errors import EXIT_LOST
from trm_dist.launch.membership import (
    Member,
    conclude,
    connect,
    current,
    main,
    move_on,
    outcome,
)


@contextmanager
def rendezvous(port: int, prefix: Sequence[str] = ()) -> Iterator[str]:
    command = [*prefix, sys.executable, "-m", "trm_dist", "rendezvous", "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == f"rendezvous at 127.0.0.1:{port}\n".encode()
            yield f"127.0.0.1:{port}"
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()


def member(endpoint: str) -> Member:
    return Member(
        job="job", endpoint=endpoint, min_nodes=1, max_nodes=2, num_workers=1, local_addr="",
        command=(), shutdown_s=1,
    )  # fmt: skip


def test_everyone_moves_on_once_and_never_in_a_new_store(free_port: int) -> None:
    with rendezvous(free_port) as endpoint:
        store = connect(endpoint)
        first = current(store, "job")
        for _ in range(3):  # however many have failed in it
            move_on(store, "job", first)
        second = current(store, "job")
        assert (second.boot, second.number) == (first.boot, first.number + 1)
        assert current(store, "other job").number == 0
    with rendezvous(free_port) as endpoint:
        store = connect(endpoint)
        fresh = current(store, "job")
        assert fresh.boot != second.boot
        assert fresh.number == first.number
        for old in (first, second):  # meant for the old store, though the number may be the same
            move_on(store, "job", old)
        assert current(store, "job") == fresh


def test_rendezvous_that_is_away_is_waited_for_without_a_dump_of_the_stack(
    free_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(connect, f"127.0.0.1:{free_port}")
        time.sleep(4)  # as long as torch would wait once, and then tell of it
        with rendezvous(free_port):
            assert current(waiting.result(), "job").number == 0
    assert "frame #" not in capfd.readouterr().err


def test_outcome_is_that_of_one_generation(free_port: int) -> None:
    with rendezvous(free_port) as endpoint:
        store = connect(endpoint)
        first = current(store, "job")
        assert outcome(store, "job", first) is None
        conclude(member(endpoint), 2)
        assert outcome(store, "job", first) == 2
        move_on(store, "job", first)
        assert outcome(store, "job", current(store, "job")) is None


def test_port_that_is_taken_is_wrong_usage(free_port: int) -> None:
    with rendezvous(free_port):
        command = [sys.executable, "-m", "trm_dist", "rendezvous", "--host", "127.0.0.1"]
        second = subprocess.run(
            [*command, "--port", str(free_port)], capture_output=True, text=True, check=False
        )
    assert second.returncode == 2
    assert f"127.0.0.1:{free_port} cannot be listened on" in second.stderr


class SlowNames:
    """A name server that knows nobody, and takes two seconds to say so."""

    ADDRESS = "127.0.0.77"

    def __init__(self) -> None:
        self.num_questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((self.ADDRESS, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            question, client = self._socket.recvfrom(512)
            self.num_questions += 1
            answer = question[:2] + b"\x81\x83" + question[4:]  # there is no such name
            threading.Timer(2, self._socket.sendto, (answer, client)).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="a place of its own for /etc/hosts needs root")
def test_rendezvous_does_not_wait_for_names(free_port: int, tmp_path: Path) -> None:
    """Whoever waits for it meanwhile would be taken for dead by the others."""
    names = SlowNames()
    (tmp_path / "hosts").touch()
    (tmp_path / "resolv.conf").write_text(f"nameserver {names.ADDRESS}\n")
    script = 'for each in hosts resolv.conf; do mount --bind "$0/$each" /etc/$each; done; exec "$@"'
    inside = ["unshare", "--mount", "sh", "-ec", script, str(tmp_path)]

    with rendezvous(free_port, inside) as endpoint:
        for _ in range(3):
            assert current(connect(endpoint), "job").number == 0

    assert names.num_questions == 1, "the first failure is the last"


def test_store_that_is_lost_while_joining_is_no_end_of_the_run(free_port: int) -> None:
    """An exit code of 1 or 2 would be taken for how the run has ended on another node."""
    store = TCPStore(
        "127.0.0.1", free_port, is_master=True, wait_for_workers=False
    )  # tells nothing

    assert main(asdict(member(f"127.0.0.1:{store.port}"))) == EXIT_LOST


def test_node_that_was_forgotten_is_not_passed_over(
    directory: Path, free_port: int, tmp_path: Path
) -> None:
    def node(number: int) -> dict[str, str]:
        memory = tmp_path / f"memory {number}"
        memory.mkdir()
        return {
            "--nnodes": "1:2", "--rdzv-endpoint": endpoint, "--rdzv-id": "job",
            "--local-addr": "127.0.0.1", "--snapshot-dir": str(memory), "--epochs": "1000",
        }  # fmt: skip

    with rendezvous(free_port) as endpoint, training(directory, launch=1, flags=node(0)) as first:
        first.wait_for_batches(5)
        agent = first.named("trm agent")
        kill(agent, signal.SIGSTOP)
        time.sleep(4)  # a sign of life is due each second, and three may be missing
        kill(agent, signal.SIGCONT)
        with training(directory, launch=1, flags=node(1)) as second:
            both = [first, second]
            second.wait_for(
                lambda: any(
                    each["world_size"] == 2 for run in both for each in run.events("started")
                ),
                "a world of both",
            )
            assert {each["world_size"] for each in second.events("started")} <= {2}
            assert "anew" not in first.errors.read_text() + second.errors.read_text()


def test_writer_that_a_group_of_its_own_job_has_replaced_meets_it_anew(
    directory: Path, undisturbed: Undisturbed, free_port: int
) -> None:
    with (
        rendezvous(free_port) as endpoint,
        training(
            directory, launch=2, flags={"--rdzv-endpoint": endpoint, "--rdzv-id": "job"}
        ) as run,
    ):
        run.wait_for_batches(10)
        store = open_store(str(directory))
        before = read_run(store)
        assert before is not None
        claim(store, before, new_writer("job"))  # as a node does that has not seen this one
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert "all meet anew" in run.errors.read_text()
    assert len(run.events("started")) == 2


def test_writer_of_another_job_ends_this_one(directory: Path, free_port: int) -> None:
    with (
        rendezvous(free_port) as endpoint,
        training(
            directory, launch=1, flags={"--rdzv-endpoint": endpoint, "--rdzv-id": "job"}
        ) as run,
    ):
        run.wait_for_batches(10)
        store = open_store(str(directory))
        before = read_run(store)
        assert before is not None
        claim(store, before, new_writer("another job"))
        assert run.end() == 1
    assert "another writer has taken over" in run.errors.read_text()
    assert len(run.events("started")) == 1
