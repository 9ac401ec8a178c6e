"""Real persisters: adopted, killed, fenced, left alone; a snapshot handed over is committed."""

import ctypes
import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import RUN, make_state
from trm_dist.checkpoint.catalog import read_summary
from trm_dist.checkpoint.client import PersisterClient
from trm_dist.checkpoint.journal import Journal, read_journals
from trm_dist.checkpoint.manager import Snapshots
from trm_dist.checkpoint.memory import Slots, SnapshotDir
from trm_dist.checkpoint.names import LATEST, epoch_name
from trm_dist.checkpoint.runs import RECORD, Run, claim, excuse, new_writer, read_run
from trm_dist.checkpoint.snapshot import Flat
from trm_dist.checkpoint.store import HIDDEN, LocalStore
from trm_dist.errors import FencedError

ROOT = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER = 36

TRAINER = """
import sys, time
from tests.unit.test_persister import Node
node = Node(sys.argv[1], sys.argv[2], guardian=int(sys.argv[3]))
node.open()
node.attach()
for batch_count in range(1, 4):
    node.capture(batch_count)
print("captured", flush=True)
for line in sys.stdin:
    node.publish(5, line.strip())
    print("asked", flush=True)
"""


class Node:
    """A trainer's end, in this process."""

    def __init__(self, directory: str, memory: str, guardian: int = 0) -> None:
        self.store = LocalStore(directory)
        self.memory = SnapshotDir(memory, self.store.identity)
        self.client = PersisterClient(directory, self.store.identity, guardian or os.getpid())

    def open(self, run: Run = RUN, **settings: Any) -> Run:
        default = {"deadline_s": 60.0, "keep_last": 0, "keep_every": 0}
        self.run = self.client.open(run, **default | settings)
        return self.run

    def start_again(self, run: Run = RUN) -> Run:
        """Open as the next trainer does, whose persister this one would be."""
        self.client._disconnect()
        self.client._trainer += " again"
        return self.open(run)

    def attach(self) -> list[dict[str, Any]]:
        flat = Flat(make_state())
        room = {"header_bytes": len(flat.header), "body_bytes": flat.num_bytes}
        self.slots: Slots = self.memory.take(num_slots=3, **room)
        self.snapshots = Snapshots(self.slots)
        self.journal = Journal.create(time.time())
        return self.client.attach(self.slots, self.journal)

    def capture(self, batch_count: int) -> None:
        self.snapshots.capture(make_state(batch_count, self.run))

    def publish(self, batch_count: int, *names: str) -> None:
        self.capture(batch_count)
        assert self.snapshots.newest is not None
        self.client.publish(*self.snapshots.newest, list(names))

    def wait_for(self, kind: str) -> dict[str, Any]:
        def event() -> dict[str, Any] | None:
            return next((each for each in self.client.events(0.1) if each["is"] == kind), None)

        return eventually(event)

    def committed(self, name: str = LATEST) -> int:
        summary = read_summary(self.store, name)
        return int(summary["batch_count"]) if summary else 0


def eventually(find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := find()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


def persisters(node: Node) -> list[int]:
    """The living persisters of a node's store."""
    address = node.client._address
    found = []
    for each in Path("/proc").iterdir():
        try:
            command = (each / "cmdline").read_text()
            is_zombie = (each / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        if address in command.split("\0") and not is_zombie:
            found.append(int(each.name))
    return found


@pytest.fixture
def memory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


@pytest.fixture
def make_node(tmp_path: Path, memory: str) -> Iterator[Callable[..., Node]]:
    """Nodes that see the same directory; whatever persister is left at the end is killed."""
    nodes = []

    def make(memory: str = memory) -> Node:
        nodes.append(Node(str(tmp_path / "run"), memory))
        return nodes[-1]

    yield make
    for node in nodes:
        node.client.close()
        for pid in persisters(node):
            os.kill(pid, signal.SIGKILL)
        if node.client._process:
            node.client._process.wait()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    node = make_node()
    node.open()
    node.attach()
    return node


@contextmanager
def slow(node: Node) -> Iterator[None]:
    """Let no file be moved into place meanwhile."""
    with open(f"{node.store.url}/.trm_dist/lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- one trainer -----------------------------------------------------------------------------------


def test_snapshot_is_committed_under_its_names_and_told(node: Node) -> None:
    node.publish(7, epoch_name(1, 7))

    event = node.wait_for("committed")

    assert event["names"] == [epoch_name(1, 7), LATEST]
    assert event["progress"]["batch_count"] == 7
    assert event["num_bytes"] == os.path.getsize(f"{node.store.url}/{LATEST}")
    assert node.committed() == node.committed(epoch_name(1, 7)) == 7


def test_opening_claims_the_next_generation(node: Node) -> None:
    assert node.run.generation == 1
    assert read_run(node.store) == node.run


def test_goodbye_ends_it(node: Node) -> None:
    node.client.close()

    eventually(lambda: not persisters(node))


def test_it_holds_nobodys_output_open(node: Node) -> None:
    (pid,) = persisters(node)

    targets = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1)]

    assert targets == [os.devnull] * 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_that_is_meant_for_trainers_does_not_end_it(
    node: Node, signum: signal.Signals
) -> None:
    os.kill(persisters(node)[0], signum)

    node.publish(1)

    node.wait_for("committed")


def test_killed_persister_is_replaced_and_commits_what_was_asked_of_it(node: Node) -> None:
    (pid,) = persisters(node)
    with slow(node):
        node.publish(5, epoch_name(1, 5))
        os.kill(pid, signal.SIGKILL)

    node.wait_for("committed")

    assert node.committed(epoch_name(1, 5)) == 5
    assert persisters(node) != [pid]
    record = read_run(node.store)
    assert record is not None
    assert record.generation == 1  # it writes on as the same one


def test_failed_publish_is_told_and_tried_again(node: Node) -> None:
    os.mkdir(f"{node.store.url}/{epoch_name(1, 3)}")  # nothing can be renamed to this
    node.publish(3, epoch_name(1, 3))

    event = node.wait_for("failed")

    assert (event["num_failures"], event["retry_in_s"]) == (1, 1.0)
    os.rmdir(f"{node.store.url}/{epoch_name(1, 3)}")
    node.wait_for("committed")
    assert node.committed(epoch_name(1, 3)) == 3


def test_urgent_job_does_not_wait_for_the_pause_of_one_that_failed(node: Node) -> None:
    os.mkdir(f"{node.store.url}/{epoch_name(1, 3)}")
    node.publish(3, epoch_name(1, 3))
    for _ in range(3):
        last = node.wait_for("failed")
    node.capture(4)
    assert node.snapshots.newest is not None

    node.client.publish(*node.snapshots.newest, [], is_urgent=True)

    event = eventually(lambda: next(iter(node.client.events(0.1)), None))
    assert (event["is"], last["num_failures"]) == ("committed", 3)
    assert node.committed() == 4


def test_directory_that_cannot_be_written_is_refused(tmp_path: Path, memory: str) -> None:
    (tmp_path / "file").write_text("")
    node = Node(str(tmp_path / "file" / "run"), memory)

    with pytest.raises(OSError, match="Not a directory"):
        node.open()

    node.client.close()
    eventually(lambda: not persisters(node))
    assert node.client._process is not None
    node.client._process.wait()


# -- two trainers ----------------------------------------------------------------------------------


def test_next_trainer_adopts_it_with_what_is_in_flight(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    trainer = start_trainer([node.store.url, memory, "1"])
    (pid,) = persisters(node)
    with slow(node):
        ask(trainer, epoch_name(1, 5))
        end(trainer)

        node.open()
        busy = node.attach()

        assert [job["sequence"] for job in busy] == [4]
        assert node.snapshots.newest is None  # nothing of its own yet
    assert node.wait_for("committed")["progress"]["batch_count"] == 5
    assert node.committed(epoch_name(1, 5)) == 5
    assert persisters(node) == [pid]
    assert node.run.generation == 1


def test_persister_that_was_stopped_by_a_signal_is_woken_by_the_next_trainer(node: Node) -> None:
    node.publish(1)
    node.wait_for("committed")
    os.kill(eventually(lambda: persisters(node))[0], signal.SIGSTOP)

    assert node.start_again(node.run).generation == node.run.generation


def test_newer_trainer_on_the_node_stops_the_older_for_good(make_node: Callable[..., Node]) -> None:
    older, newer = make_node(), make_node()
    older.open()
    older.attach()
    newer.open()

    with pytest.raises(FencedError, match="has taken over"):
        older.wait_for("committed")
    newer.attach()
    newer.publish(3)
    newer.wait_for("committed")


def test_trainer_in_another_container_with_the_same_network_and_path_writes_to_its_own_place(
    node: Node, memory: str, tmp_path: Path
) -> None:
    own_place = tmp_path / "volume of the other container"
    own_place.mkdir()
    mount = f"mount --bind '{own_place}' {node.store.url} && exec \"$@\""
    container = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        pytest.skip("another mount namespace needs root")
    with subprocess.Popen(["sleep", "100"]) as guardian:
        trainer = start_trainer([node.store.url, memory, str(guardian.pid)], container)
        ask(trainer, epoch_name(1, 5))
        guardian.kill()
        end(trainer)

    eventually(lambda: read_summary(LocalStore(str(own_place)), epoch_name(1, 5)))
    node.publish(7)
    node.wait_for("committed")
    assert node.committed(epoch_name(1, 5)) == 0


def test_older_trainer_that_publishes_first_hears_it_too(make_node: Callable[..., Node]) -> None:
    older, newer = make_node(), make_node()
    older.open()
    older.attach()
    newer.open()
    newer.attach()

    def publish_twice() -> None:
        for batch_count in (1, 2):  # the first may still fit into the socket
            older.publish(batch_count)
            older.client.events(0.2)

    with pytest.raises(FencedError, match="has taken over"):
        publish_twice()

    newer.publish(3)
    newer.wait_for("committed")
    assert newer.committed() == 3


def test_fenced_trainer_that_publishes_again_does_not_stop_the_newer_one(
    make_node: Callable[..., Node],
) -> None:
    older, newer = make_node(), make_node()
    older.open()
    older.attach()
    newer.open()
    newer.attach()
    with pytest.raises(FencedError):
        older.wait_for("committed")

    with pytest.raises(FencedError):  # as the thread of a stop does
        older.publish(5)

    newer.publish(3)
    assert newer.wait_for("committed")["progress"]["batch_count"] == 3


def test_trainer_that_replaces_its_persister_does_not_take_over_from_a_newer_one(
    node: Node,
) -> None:
    newer = claim(node.store, RUN, new_writer())
    os.kill(persisters(node)[0], signal.SIGKILL)

    with pytest.raises(FencedError, match="another writer has taken over"):
        node.wait_for("committed")

    assert read_run(node.store) == newer


def test_persisters_killed_at_any_moment_of_their_start_do_not_fence_their_own_trainer(
    node: Node,
) -> None:
    chance, end_s = random.Random(1), time.monotonic() + 4
    num_killed = 0
    while time.monotonic() < end_s:
        node.publish(1 + num_killed, epoch_name(1, 1 + num_killed))
        born_s = time.monotonic() + chance.uniform(0.0, 0.2)
        while time.monotonic() < born_s or not persisters(node):
            node.client.events(0.01)
        for each in persisters(node):
            os.kill(each, signal.SIGKILL)
            num_killed += 1

    node.publish(100)

    eventually(lambda: node.client.events(0.1) and node.committed() == 100)
    assert num_killed > 5
    assert node.committed(epoch_name(1, 1)) == 1


def test_writer_that_comes_back_to_its_node_takes_the_next_generation(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    end(start_trainer([node.store.url, memory, "1"]))
    claim(node.store, RUN, new_writer())  # meanwhile another node writes

    assert node.open().generation == 3
    node.attach()
    node.publish(5)

    assert node.wait_for("committed")["progress"]["batch_count"] == 5


def test_record_that_was_removed_by_hand_is_written_again_for_the_next_trainer(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    trainer = start_trainer([node.store.url, memory, "1"])
    node.store.delete(RECORD)
    end(trainer)

    run = node.open()

    assert read_run(node.store) == run


def test_fence_of_the_trainer_before_does_not_stop_the_one_that_just_connected(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    trainer = start_trainer([node.store.url, memory, "1"])
    persister = persisters(node)[0]
    os.kill(persister, signal.SIGSTOP)
    ask(trainer, epoch_name(1, 5))
    claim(node.store, RUN, new_writer())  # meanwhile another node writes
    node.client._connect()
    os.kill(persister, signal.SIGCONT)

    assert node.client._receive(1.0) is None
    assert node.client._socket is not None
    end(trainer)
    assert persisters(node) == [persister]


def test_writer_of_another_node_stops_this_one(node: Node) -> None:
    claim(node.store, RUN, new_writer())

    node.publish(1)

    with pytest.raises(FencedError, match="another writer has taken over"):
        node.wait_for("committed")
    assert node.committed() == 0
    eventually(lambda: not persisters(node))


def test_another_run_takes_the_next_generation_and_old_jobs_are_dropped(
    make_node: Callable[..., Node],
) -> None:
    first, second = make_node(), make_node()
    first.open()
    first.attach()
    with slow(first):
        first.publish(1)
        first.publish(2)
    second.open(Run.fresh("launch-2"))
    second.attach()

    second.publish(1)

    second.wait_for("committed")
    summary = read_summary(second.store, LATEST)
    assert summary is not None
    assert summary["run_id"] == second.run.run_id
    assert second.run.generation == 2


# -- nobody left -----------------------------------------------------------------------------------


def test_newest_snapshot_of_a_killed_trainer_is_committed(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    arguments = [node.store.url, memory, "1"]
    trainer = start_trainer(arguments)
    end(trainer)

    eventually(lambda: node.committed() == 3)

    assert persisters(node) != []  # process 1 lives, and may start the trainer again


def test_it_ends_and_leaves_no_memory_when_nobody_can_come_back(
    make_node: Callable[..., Node], memory: str
) -> None:
    node = make_node()
    with subprocess.Popen(["sleep", "100"]) as guardian:
        trainer = start_trainer([node.store.url, memory, str(guardian.pid)])
        guardian.kill()
        end(trainer)
        eventually(lambda: not persisters(node))

    assert node.committed() == 3
    assert os.listdir(memory) == []


def start_trainer(arguments: list[str], container: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
    command = [*container, sys.executable, "-c", TRAINER, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    trainer = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"captured\n"
    return trainer


def ask(trainer: "subprocess.Popen[bytes]", name: str) -> None:
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    trainer.stdin.write(f"{name}\n".encode())
    trainer.stdin.flush()
    assert trainer.stdout.readline() == b"asked\n"


def end(trainer: "subprocess.Popen[bytes]") -> None:
    trainer.kill()
    with trainer:
        pass


STARTER = """
import os, subprocess, sys
module = ["-m", "trm_dist.checkpoint.persister", sys.argv[1], str(os.getpid())]
child = subprocess.Popen(
    [sys.executable, *module], stdout=subprocess.DEVNULL, start_new_session=True
)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_persister_whose_starter_dies_before_it_has_connected_ends() -> None:
    address = f"trm_dist-test-{random.randbytes(6).hex()}"
    command = [sys.executable, "-c", STARTER, address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        eventually(lambda: address in Path("/proc/net/unix").read_text())
        time.sleep(0.3)
        assert Path(f"/proc/{pid}").exists(), "it waits as long as its starter lives"
        starter.kill()
    _wait_for_end(pid)


def test_persister_whose_starter_is_gone_before_it_runs_waits_for_nobody_else() -> None:
    command = [sys.executable, "-c", STARTER, f"trm_dist-test-{random.randbytes(6).hex()}"]
    with _orphans_become_children():  # as those of a node do under `trm_dist launch`
        starter = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT, check=True
        )
        pid = int(starter.stdout)
        try:
            _wait_for_end(pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextmanager
def _orphans_become_children() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _wait_for_end(pid: int) -> None:
    give_up_at = time.monotonic() + 15  # far less than it would wait for a client
    while _is_running(pid):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -- the journal -----------------------------------------------------------------------------------


def write(node: Node, text: bytes) -> None:
    os.write(node.journal.descriptor, text)


def kept(node: Node) -> list[bytes]:
    return list(read_journals(node.store))


def test_journal_is_kept_with_each_commit(node: Node) -> None:
    write(node, b"one")
    node.publish(1)
    node.wait_for("committed")
    eventually(lambda: kept(node) == [b"one"])

    write(node, b" two")
    node.publish(2)
    node.wait_for("committed")

    eventually(lambda: kept(node) == [b"one two"])


def test_journal_is_kept_when_it_is_asked_for(node: Node) -> None:
    write(node, b"the end")

    node.client.keep_journal(60.0)

    assert kept(node) == [b"the end"]


def test_journal_that_cannot_be_kept_keeps_nobody_waiting(node: Node) -> None:
    write(node, b"the end")

    with slow(node):
        node.client.keep_journal(0.2)
        assert kept(node) == []

    eventually(lambda: kept(node) == [b"the end"])


def test_journal_that_a_store_has_refused_is_kept_at_the_next_commit(node: Node) -> None:
    write(node, b"one")
    Path(f"{node.store.url}/{node.journal.name}").mkdir(parents=True)
    node.client.keep_journal(60.0)
    assert [each.name for each in node.store.entries(HIDDEN) if "ledger" in each.name] == []
    Path(f"{node.store.url}/{node.journal.name}").rmdir()

    node.publish(1)
    node.wait_for("committed")

    eventually(lambda: kept(node) == [b"one"])


def test_goodbye_keeps_the_journal(node: Node) -> None:
    write(node, b"the end")

    node.client.close()

    eventually(lambda: not persisters(node))
    assert kept(node) == [b"the end"]


def kinds_until_committed(node: Node) -> list[str]:
    """Publish, and return what is told until that is committed."""
    node.publish(1)
    kinds: list[str] = []

    def is_committed() -> bool:
        kinds.extend(each["is"] for each in node.client.events(0.1))
        return "committed" in kinds

    eventually(is_committed)
    return kinds


def test_next_trainer_does_not_hear_of_the_journal_of_the_one_before(
    node: Node, make_node: Callable[..., Node]
) -> None:
    write(node, b"first")
    following = make_node()
    with slow(node):
        node.client._disconnect()  # as a kill does
        following.open(node.run)
        following.attach()

    eventually(lambda: kept(node) == [b"first"])
    messages = []
    while (message := following.client._receive(1.0)) is not None:
        messages.append(message)
    assert messages == []
    assert kinds_until_committed(following) == ["committed"]


def test_journal_that_was_kept_late_is_no_event(node: Node) -> None:
    write(node, b"late")
    with slow(node):
        node.client.keep_journal(0.2)

    eventually(lambda: kept(node) == [b"late"])
    assert kinds_until_committed(node) == ["committed"]


def test_trainer_that_asks_while_a_journal_is_being_kept_hears_of_its_own(
    node: Node, make_node: Callable[..., Node]
) -> None:
    write(node, b"first")
    following = make_node()
    with slow(node):
        node.client._disconnect()
        following.open(node.run)
        following.attach()
        write(following, b"second")
        following.client.keep_journal(0.2)

    eventually(lambda: following.client._receive(0.1) == {"is": "kept"})
    assert kept(node) == [b"first", b"second"]


def test_journal_of_a_killed_trainer_is_kept_beside_that_of_the_next(node: Node) -> None:
    write(node, b"first")
    node.client._disconnect()  # as the kernel does for a process that is killed
    first = node.journal

    node.open()
    node.attach()
    write(node, b"second")
    node.publish(1)
    node.wait_for("committed")

    eventually(lambda: kept(node) == [b"first", b"second"])
    assert first.name != node.journal.name


def test_journal_outlives_its_persister(node: Node) -> None:
    write(node, b"one")
    os.kill(persisters(node)[0], signal.SIGKILL)
    node.publish(1)
    node.wait_for("committed")

    eventually(lambda: kept(node) == [b"one"])


# -- counting --------------------------------------------------------------------------------------


def test_starts_in_the_same_place_count_as_failures_also_when_it_is_adopted(node: Node) -> None:
    at_seven = replace(RUN, starts_at=7)
    starts = (RUN, at_seven, at_seven, at_seven, replace(RUN, starts_at=8))
    counts = [node.start_again(each).failures for each in starts]

    assert counts == [1, 0, 1, 2, 0]
    assert node.run.generation == 1
    eventually(lambda: read_run(node.store) == node.run)


def test_count_of_the_newest_of_many_starts_within_a_moment_is_what_stays(node: Node) -> None:
    for _ in range(20):
        for _ in range(5):
            node.start_again()
        eventually(lambda: read_run(node.store) == node.run)

    assert node.run.failures == 100


def test_trainer_that_plans_twice_counts_once(node: Node) -> None:
    counts = [node.start_again().failures, node.open().failures]
    eventually(lambda: read_run(node.store) == node.run)

    assert counts == [1, 1]
    assert node.open(replace(RUN, starts_at=7)).failures == 0


def test_start_that_was_stopped_counts_as_a_preemption(node: Node) -> None:
    excuse(node.store, node.run)

    found = node.start_again()

    assert (found.failures, found.preemptions) == (0, 1)
