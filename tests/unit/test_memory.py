"""Slots in memory: what a kill leaves, who may write, and what happens when there is no room.

Kills happen in children of a small process that never imports torch, this file run as a program,
as in test_commit_kill.py.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.test_commit_kill import killer
from trm_dist.checkpoint import memory as memory_module
from trm_dist.checkpoint.memory import (
    Slots,
    SnapshotDir,
    private_slots,
    remove_if_unlocked,
    reopened,
    take_slots,
)
from trm_dist.checkpoint.replay import NUM_BYTES

ROOT = Path(__file__).parents[2]
SIZE = {"num_slots": 3, "header_bytes": 100, "body_bytes": 5000}

HOLD = """
import sys
from trm_dist.checkpoint.memory import SnapshotDir
directory, identity = sys.argv[1:]
slots = SnapshotDir(directory, identity).take(num_slots=3, header_bytes=100, body_bytes=5000)
slots.begin(0)[:5] = b"child"
slots.finish(0, 1, b"of the child")
print("held", flush=True)
sys.stdin.read()
"""


def capture(slots: Slots, slot: int, sequence: int) -> None:
    """Fill a slot with its number, in a few steps as a copy of several tensors is."""
    body = slots.begin(slot)
    for start in range(0, 5000, 1000):
        body[start : start + 1000] = bytes([sequence]) * 1000
    slots.finish(slot, sequence, b"header %d" % sequence)


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


@pytest.fixture
def own(directory: str) -> SnapshotDir:
    return SnapshotDir(directory, "store")


@pytest.fixture
def holder(directory: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that writes snapshots of the same store."""
    command = [sys.executable, "-c", HOLD, directory, "store"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# -- slots -----------------------------------------------------------------------------------------


def test_slot_gives_back_what_was_written() -> None:
    slots = private_slots(**SIZE)

    capture(slots, 1, 7)

    held = slots.read(1)
    assert held is not None
    assert (held.slot, held.sequence, held.header) == (1, 7, b"header 7")
    assert bytes(held.body[:5000]) == b"\x07" * 5000


def test_newest_is_the_one_with_the_largest_sequence_number() -> None:
    slots = private_slots(**SIZE)
    assert slots.newest() is None

    for slot, sequence in ((2, 5), (0, 6), (1, 4)):
        capture(slots, slot, sequence)

    newest = slots.newest()
    assert newest is not None
    assert newest.sequence == 6


def test_slot_that_is_being_written_is_torn() -> None:
    slots = private_slots(**SIZE)
    capture(slots, 0, 1)

    slots.begin(0)

    assert slots.read(0) is None


def test_every_flipped_bit_of_a_header_is_found() -> None:
    slots = private_slots(**SIZE)
    capture(slots, 0, 1)
    size = os.fstat(slots.descriptor).st_size
    whole = os.pread(slots.descriptor, size, 0)
    place = whole.index(b"header 1")

    for bit in range(8 * len(b"header 1")):
        flipped = whole[place + bit // 8] ^ (1 << bit % 8)
        os.pwrite(slots.descriptor, bytes([flipped]), place + bit // 8)
        assert slots.read(0) is None
        os.pwrite(slots.descriptor, whole[place : place + 8], place)
    for bit in range(8 * 24):  # sequence number, length and checksum
        place = 4096 + bit // 8
        os.pwrite(slots.descriptor, bytes([whole[place] ^ (1 << bit % 8)]), place)
        assert slots.read(0) is None
        os.pwrite(slots.descriptor, whole[place : place + 1], place)
    assert slots.read(0) is not None


def test_copy_of_a_slot_stays_when_its_writer_goes_on() -> None:
    slots = private_slots(**SIZE)
    capture(slots, 0, 1)
    held = Slots(reopened(slots)).newest()
    assert held is not None

    copy = held.copied()
    for sequence in range(2, 9):
        capture(slots, sequence % 3, sequence)

    assert (copy.sequence, bytes(copy.body[:5000])) == (1, b"\x01" * 5000)


def test_copy_is_made_of_what_is_newest_by_then() -> None:
    slots = private_slots(**SIZE)
    capture(slots, 0, 1)
    held = Slots(reopened(slots)).newest()
    assert held is not None
    for sequence in range(2, 9):
        capture(slots, sequence % 3, sequence)

    copy = held.copied()

    assert (copy.sequence, bytes(copy.body[:5000])) == (8, b"\x08" * 5000)


@pytest.mark.parametrize("content", [b"", b"x" * 10, bytes(10_000), b"x" * 50_000])
def test_other_file_is_not_one_of_slots(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(ValueError, match="snapshots"):
        Slots(file.fileno())


def test_reader_sees_what_is_written_later() -> None:
    slots = private_slots(**SIZE)
    reader = Slots(reopened(slots))
    assert reader.newest() is None

    capture(slots, 0, 1)
    capture(slots, 1, 2)

    newest = reader.newest()
    assert newest is not None
    assert bytes(newest.body[:5000]) == b"\x02" * 5000


# -- files -----------------------------------------------------------------------------------------


def test_file_is_private_and_all_of_it_is_really_there(own: SnapshotDir) -> None:
    slots = own.take(**SIZE)

    status = os.fstat(slots.descriptor)
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= status.st_size


def test_file_of_a_dead_writer_is_taken_over_with_what_it_holds(
    own: SnapshotDir, holder: "subprocess.Popen[str]"
) -> None:
    holder.kill()
    holder.wait()

    slots = own.take(**SIZE)

    newest = slots.newest()
    assert newest is not None
    assert (newest.header, bytes(newest.body[:5])) == (b"of the child", b"child")
    assert len(os.listdir(own.directory)) == 1


def test_file_of_a_living_writer_is_read_and_not_taken(
    own: SnapshotDir, holder: "subprocess.Popen[str]"
) -> None:
    assert [each.header for each in own.held()] == [b"of the child"]

    slots = own.take(**SIZE)

    assert slots.newest() is None
    assert len(os.listdir(own.directory)) == 2
    assert holder.poll() is None


def test_file_of_another_size_is_replaced_and_those_who_read_it_still_can(
    own: SnapshotDir, holder: "subprocess.Popen[str]"
) -> None:
    (old,) = own.held()
    holder.kill()
    holder.wait()

    slots = own.take(num_slots=3, header_bytes=100, body_bytes=50_000)
    capture(slots, 0, 1)

    assert bytes(old.body[:5]) == b"child"
    assert [each.header for each in own.held()] == [b"header 1"]


@pytest.mark.parametrize("num_digits", [0, 1, 1000])
def test_slots_still_fit_though_a_header_grows_by_some_digits(num_digits: int) -> None:
    size = {"num_slots": 3, "header_bytes": 8192, "body_bytes": 5000}
    slots = private_slots(**size)

    assert slots.fits(**size | {"header_bytes": 8192 + num_digits})


def test_files_of_other_stores_are_not_read(own: SnapshotDir, directory: str) -> None:
    capture(SnapshotDir(directory, "another").take(**SIZE), 0, 1)

    assert list(own.held()) == []


def test_link_is_never_followed(own: SnapshotDir, directory: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = os.path.basename(os.readlink(f"/proc/self/fd/{own.take(**SIZE).descriptor}"))
    os.unlink(f"{directory}/{name}")
    os.symlink(victim, f"{directory}/{name}")

    with suppress(OSError):
        own.take(**SIZE)

    assert victim.read_text() == "mine"
    assert list(own.held()) == []


def test_removal_leaves_the_file_of_a_living_writer(
    own: SnapshotDir, holder: "subprocess.Popen[str]"
) -> None:
    (name,) = os.listdir(own.directory)
    with open(f"{own.directory}/{name}", "rb") as file:
        remove_if_unlocked(Slots(file.fileno()))
    assert os.listdir(own.directory) == [name]

    holder.kill()
    holder.wait()
    with open(f"{own.directory}/{name}", "rb") as file:
        remove_if_unlocked(Slots(file.fileno()))
    assert os.listdir(own.directory) == []


def test_own_file_is_removed(own: SnapshotDir) -> None:
    remove_if_unlocked(own.take(**SIZE))

    assert os.listdir(own.directory) == []


def test_stale_files_are_reclaimed_and_no_others(
    own: SnapshotDir, holder: "subprocess.Popen[str]", directory: str
) -> None:
    (living,) = os.listdir(directory)
    for identity, age_s in (("stale", 7200), ("fresh", 60)):
        slots = SnapshotDir(directory, identity).take(**SIZE)
        path = os.readlink(f"/proc/self/fd/{slots.descriptor}")
        os.close(slots.descriptor)
        os.utime(path, (time.time() - age_s,) * 2)
    os.utime(f"{directory}/{living}", (0, 0))
    Path(directory, "of-somebody-else").write_text("")

    own.reclaim()

    left = os.listdir(directory)
    assert len(left) == 3
    assert {living, "of-somebody-else"} <= set(left)


def test_writing_keeps_a_file_from_growing_stale(own: SnapshotDir) -> None:
    slots = own.take(**SIZE)
    os.utime(slots.descriptor, (0, 0))

    capture(slots, 0, 1)

    assert time.time() - os.fstat(slots.descriptor).st_mtime < 60


# -- no room ---------------------------------------------------------------------------------------


class Small:
    """posix_fallocate of a file system with so many bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._real = os.posix_fallocate

    def __call__(self, descriptor: int, offset: int, size: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if size > self._num_bytes and not path.startswith("/memfd"):
            raise OSError(28, "No space left on device")
        self._real(descriptor, offset, size)


@pytest.mark.parametrize(
    ("num_bytes", "num_slots", "num_files", "message"),
    [
        (100_000, 3, 1, ""),
        (50_000, 2, 1, "only 2 of 3 memory snapshots"),
        (10_000, 2, 0, "not even two memory snapshots"),
    ],
)
def test_fewer_slots_are_taken_where_there_is_less_room(
    directory: str, num_bytes: int, num_slots: int, num_files: int, message: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "posix_fallocate", Small(NUM_BYTES + num_bytes))

    slots = take_slots(directory, "store", **SIZE)

    capture(slots, 0, 1)
    assert slots.newest() is not None
    assert slots.num_slots == num_slots
    assert len(os.listdir(directory)) == num_files
    assert message in caplog.text
    assert ("--snapshot-slots" in caplog.text) is bool(message)


def test_no_slots_at_all_can_be_asked_for(directory: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        slots = take_slots(directory, "store", num_slots=0, header_bytes=100, body_bytes=5000)

    assert slots.num_slots == 2
    assert os.listdir(directory) == []
    assert caplog.text == ""


def test_missing_directory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    slots = take_slots("/no/such/directory", "store", **SIZE)

    assert slots.num_slots == 2
    assert "/no/such/directory: not even two" in caplog.text


# -- kills -----------------------------------------------------------------------------------------


def kill_at(directory: str, line: int) -> "tuple[int, bytes] | None":
    """Kill a child at a line of its third capture; return what is newest then."""
    own = SnapshotDir(directory, f"store {line}")
    child = os.fork()
    if not child:
        slots = own.take(**SIZE)
        capture(slots, 0, 1)
        capture(slots, 1, 2)
        sys.settrace(killer(line, {memory_module.__file__, __file__}))
        capture(slots, 2, 3)
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        return None
    assert os.WTERMSIG(status) == signal.SIGKILL
    (newest,) = own.held()
    return newest.sequence, bytes(newest.body[:5000])


def kill_everywhere(directory: str) -> None:
    assert "torch" not in sys.modules
    found, line = [], 1
    while left := kill_at(directory, line):
        sequence, body = left
        found.append([sequence, body == bytes([sequence]) * 5000])
        line += 1
    json.dump(found, sys.stdout)


def test_kill_at_any_line_of_a_capture_leaves_the_newest_whole(directory: str) -> None:
    command = [sys.executable, "-m", __name__, directory]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)

    found = json.loads(done.stdout)

    assert len(found) > 25
    assert all(is_whole for _, is_whole in found)
    sequences = [sequence for sequence, _ in found]
    assert sequences == sorted(sequences)
    assert set(sequences) == {2, 3}


if __name__ == "__main__":
    kill_everywhere(sys.argv[1])
