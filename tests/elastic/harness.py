"""Starts real trainings, watches their events, and kills what it is told to kill.

Only processes that a test started are ever signalled, by their id.
"""

import atexit
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 240.0

_MARK = "TEST_TRAINING"
"""Variable that all processes of one training inherit."""

SNAPSHOTS = tempfile.mkdtemp(prefix="trm_dist-test-", dir="/dev/shm")
"""Where the memory snapshots of all trainings under test lie."""
atexit.register(shutil.rmtree, SNAPSHOTS, ignore_errors=True)

# 96 samples in batches of 10: ten batches an epoch, the last of 6 samples, so one shard is partly
# and one wholly empty in it. Clipping, warm-up and halting exploration are all at work.
SMALL = {
    "--dataset": "sudoku4:train?count=96",
    "--eval-dataset": "sudoku4:test?count=30",
    "--batch-size": "10",
    "--shards": "5",
    "--dim": "16",
    "--n-sup": "2",
    "--h-cycles": "2",
    "--l-cycles": "1",
    "--lr": "3e-3",
    "--warmup-steps": "20",
    "--halt-explore": "0.3",
    "--epochs": "8",
    "--checkpoint-interval": "7",
    "--snapshot-dir": SNAPSHOTS,
    "--log-format": "json",
}


@dataclass
class Training:
    """A training under test: one process tree, its events and its messages."""

    process: subprocess.Popen[bytes]
    output: Path
    errors: Path
    mark: str
    _offset: int = field(default=0)
    _events: list[dict[str, Any]] = field(default_factory=list)

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """All events so far, or those of one kind."""
        with self.output.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._events += [json.loads(line) for line in whole.splitlines() if line[:1] == b"{"]
        return [each for each in self._events if kind in {"", each["event"]}]

    def wait_for(self, holds: Callable[[], Any], what: str) -> None:
        """Wait until something holds; fail when the training ends first or it takes too long."""
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert self.process.poll() is None, f"ended before {what}:\n{self.messages()}"
            assert time.monotonic() < deadline, f"waited too long for {what}:\n{self.messages()}"
            time.sleep(0.005)

    def wait_for_batches(self, more: int) -> None:
        """Wait for some more completed batches, replayed ones included."""
        goal = len(self.events("batch")) + more
        self.wait_for(lambda: len(self.events("batch")) >= goal, f"{more} more batches")

    def wait_for_start(self, starts: int) -> None:
        """Wait until the workers have started for the n-th time."""
        self.wait_for(lambda: len(self.events("started")) >= starts, f"start {starts}")

    def worker(self, rank: int) -> int:
        """The process id of a living worker; the order of ids is that of local ranks."""
        found: list[int] = []

        def both() -> bool:
            found[:] = sorted(children(self.process.pid))
            return len(found) > rank

        self.wait_for(both, f"worker {rank}")
        return found[rank]

    def names(self) -> set[str]:
        """The names of its living processes."""
        return {_name(pid) for pid in self.processes()}

    def named(self, name: str) -> int:
        """The process id of a living process of `trm_dist launch`, by its name."""
        found: list[int] = []

        def one() -> bool:
            found[:] = [pid for pid in self.processes() if _name(pid) == name]
            return bool(found)

        self.wait_for(one, name)
        return found[0]

    def processes(self) -> list[int]:
        """All its living processes, also those whose parent is gone."""
        return _marked(self.mark)

    def persister(self) -> int:
        """The process id of the living persister."""
        found: list[int] = []

        def one() -> bool:
            found[:] = [
                pid for pid in self.processes() if "trm_dist.checkpoint.persister" in _command(pid)
            ]
            return bool(found)

        self.wait_for(one, "a persister")
        return found[0]

    def told(self) -> int:
        """The batch count of the newest batch that was told of."""
        return max((each["batch_count"] for each in self.events("batch")), default=0)

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(DEADLINE_S)

    def messages(self) -> str:
        """What stands on stderr, the end of it."""
        return self.errors.read_text()[-6000:]

    def losses(self) -> dict[int, set[str]]:
        """The exact losses seen of every batch, replays included."""
        found: dict[int, set[str]] = {}
        for each in self.events("batch"):
            found.setdefault(each["batch_count"], set()).add(each["loss"].hex())
        return found

    def digest(self) -> str:
        """The digest at the end of a finished run."""
        return str(self.events("finished")[-1]["digest"])


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody touched came to."""

    losses: dict[int, set[str]]
    digest: str


def children(pid: int) -> list[int]:
    """The living children of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(each) for each in text.split() if _is_alive(int(each))]


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    """Signal a process that may just have ended."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def kill_all(training: Training) -> None:
    """Kill a whole tree at once, torchrun first."""
    tree = [training.process.pid, *children(training.process.pid)]
    for pid in tree:
        kill(pid)
    training.process.wait(DEADLINE_S)
    wait_until_gone(tree[1:])


def kill_everything(training: Training) -> None:
    """Kill a whole tree at once, and the persister beside it."""
    everyone = training.processes()
    for pid in everyone:
        kill(pid, signal.SIGSTOP)  # so that nobody can do anything about the others' end
    for pid in everyone:
        kill(pid)
    training.process.wait(DEADLINE_S)
    wait_until_gone(everyone)


def forget_snapshots(directory: str = SNAPSHOTS) -> None:
    """Lose what memory holds, as a node does that is switched off."""
    for each in Path(directory).iterdir():
        each.unlink()


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + 30
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.02)


@contextmanager
def training(
    directory: Path,
    *,
    workers: int = 0,
    max_restarts: int = 0,
    launch: int = 0,
    flags: dict[str, str] | None = None,
    base: dict[str, str] = SMALL,
    variables: dict[str, str] | None = None,
) -> Iterator[Training]:
    """Start the small training; whatever is left of it at the end is killed.

    Args:
        directory: Of the checkpoints; logs go beside it.
        workers: Under plain torchrun; 0: under python.
        max_restarts: torchrun's.
        launch: Workers under `trm_dist launch` instead.
        flags: Flags besides or instead of the base's.
        base: Flags that are usually given.
        variables: Of its environment.
    """
    launcher = [sys.executable, "-m"]
    if workers:
        launcher += ["torch.distributed.run", f"--nproc_per_node={workers}"]
        launcher += [f"--max-restarts={max_restarts}", "-m"]
    wanted = base | {"--checkpoint-dir": str(directory)} | (flags or {})
    command = [*launcher, "trm_dist", "train", *as_arguments(wanted)]
    if launch:
        own = [f"--nproc-per-node={launch}"]
        command = [sys.executable, "-m", "trm_dist", "launch", *own, *as_arguments(wanted)]
    with started(directory, command, variables) as running:
        yield running


def as_arguments(flags: dict[str, str]) -> list[str]:
    """The flags as they stand on a command line."""
    return [part for pair in flags.items() for part in pair if part]


@contextmanager
def started(
    directory: Path, command: list[str], variables: dict[str, str] | None = None
) -> Iterator[Training]:
    """Start a command with some variables; its output goes beside the directory."""
    number = len(list(directory.parent.glob("*.out")))
    output = directory.parent / f"{number}.out"
    errors = directory.parent / f"{number}.err"
    # No thread settings, no torchrun settings: what a person who types the command has.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCH", "OMP_", "RANK", "WORLD", "MASTER"))
    }
    mark = f"{_MARK}={secrets.token_hex(8)}"
    environment |= dict([mark.split("=")]) | (variables or {})
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    running = Training(process, output, errors, mark)
    try:
        yield running
    finally:
        left = _marked(mark)
        for pid in left:
            kill(pid)
        process.wait(DEADLINE_S)
        wait_until_gone(left)


@contextmanager
def small_file_system(mount: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own size, which `resize` changes."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own size needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def resize(mount: Path, size: str) -> None:
    """Change the size of a small file system."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], check=True)


def _marked(mark: str) -> list[int]:
    """The processes of one training, also those whose parent is gone."""
    found = []
    for each in Path("/proc").iterdir():
        with suppress(OSError):
            if each.name.isdigit() and mark.encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _name(pid: int) -> str:
    """What ps calls it; for processes that are told apart by their command, a word of it."""
    command = _command(pid).split("\0")
    for word in ("zygote", "stub.py", "rendezvous", "trm_dist.checkpoint.persister"):
        if any(each == word or each.endswith(f"/{word}") for each in command):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                return ""
            return name if name.startswith("trm ") else word
    return ""


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
