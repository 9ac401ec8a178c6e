"""A process that has imported what workers need, and forks them: they are there at once.

Python and torch take two seconds to start with all that training imports, and a restart has hardly
anything else to wait for. So this process imports it once. It has one thread, no store, no
accelerator and no file system, hence forking is safe; where a library has started a thread it is
not, and everything is started as a command instead.

It starts an elastic agent when the supervisor says so, and a worker when a stub of the agent asks.
Workers die with it, and it ends them when their agent or their stub is gone.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from trm_dist.elastic.agent import CAUSE, ERROR_FILE, PULSE, RESTARTS
from trm_dist.elastic.process import ended_by
from trm_dist.errors import EXIT_CRASHED, EXIT_LOST

MAX_MESSAGE_BYTES = 1 << 20

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_MOST_CAUSE_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Program:
    """What a child runs: a function where it is forked, else a command."""

    name: str
    """For ps and top; up to 15 bytes."""
    function: Callable[..., int]
    command: Sequence[str]


@dataclass(slots=True)
class _Worker:
    """A living worker and the stub that stands for it."""

    stub: socket.socket
    rank: int
    local_rank: int
    error_file: str
    was_killed: bool = False
    """By us, so that its end says nothing."""


class Zygote:
    """The process: it waits for messages and for the ends of its children."""

    def __init__(
        self, control: socket.socket, listener: socket.socket, pulse: int,
        *, worker: Program, agent: Program,
    ) -> None:  # fmt: skip
        """Get ready; everything is imported.

        Args:
            control: Of the supervisor.
            listener: Where stubs connect.
            pulse: Descriptor that workers inherit.
            worker: Trains; takes nothing.
            agent: Takes what the supervisor says of the rendezvous.
        """
        self._control, self._listener, self._pulse = control, listener, pulse
        self._worker, self._agent = worker, agent
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._agent_pid = 0
        self._starts: dict[int, int] = {}
        self._first_start = int(os.environ.get(RESTARTS, "0"))
        """Not 0 when another zygote has started workers before."""
        self._is_stopping = False
        self._cause = ""
        """Why workers have ended since the newest ones were started: what came first."""
        self._cause_before = ""

    def run(self) -> NoReturn:
        """Serve until the supervisor is gone."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._selector.register(self._control, selectors.EVENT_READ, self._obey)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(read_end, selectors.EVENT_READ, lambda: os.read(read_end, 64))
        self._tell({"is": "ready", "can_fork": can_fork()})
        while True:
            for key, _ in self._selector.select():
                key.data()
            self._reap()

    # -- the supervisor ----------------------------------------------------------------------------

    def _tell(self, content: Mapping[str, Any]) -> None:
        with suppress(OSError):  # the kernel ends this process with the supervisor
            self._control.send(json.dumps(content).encode())

    def _obey(self) -> None:
        message = self._control.recv(MAX_MESSAGE_BYTES)
        if not message:
            os._exit(0)  # the kernel ends the others
        content = json.loads(message)
        match content.pop("do"):
            case "join":
                environment = os.environ | content.pop("environment")
                self._agent_pid = self._start(self._agent, [content], environment, [0, 1, 2])
            case "stop":
                self._is_stopping = True
                if self._agent_pid:
                    os.kill(self._agent_pid, content["signal"])
            case "leave":
                if self._agent_pid:
                    os.kill(self._agent_pid, signal.SIGTERM)
            case "kill":
                self._blame(f"worker {content['rank']}", content["error"])
                self._kill(content["pid"])

    # -- stubs and workers -------------------------------------------------------------------------

    def _accept(self) -> None:
        stub, _ = self._listener.accept()
        user = struct.unpack("3i", stub.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user == os.getuid():
            self._selector.register(stub, selectors.EVENT_READ, lambda: self._hear(stub))
        else:
            stub.close()

    def _hear(self, stub: socket.socket) -> None:
        """Serve a stub: it asks for a worker, passes a signal on, or is gone."""
        if stub.fileno() < 0:
            return
        pid = next((pid for pid, each in self._workers.items() if each.stub is stub), 0)
        try:
            message, descriptors, *_ = socket.recv_fds(stub, MAX_MESSAGE_BYTES, 4)
        except ConnectionError:
            message, descriptors = b"", []
        if not message:
            self._forget(stub)
            self._kill(pid)
        elif pid and self._is_stopping:
            os.kill(pid, message[0])
        elif pid:
            # The agent starts the workers anew. What is finished is in memory already; a worker
            # that waits for a dead one would only keep the others waiting.
            self._kill(pid)
        else:
            *streams, environment = descriptors
            with os.fdopen(environment, "rb") as file:
                file.seek(0)
                self._start_worker(stub, json.load(file), streams)

    def _start_worker(
        self, stub: socket.socket, environment: dict[str, str], descriptors: Sequence[int]
    ) -> None:
        rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        environment[PULSE] = str(self._pulse)
        starts = self._starts.get(local_rank, self._first_start)
        environment[RESTARTS] = str(starts)
        if not self._workers:  # the first of them
            self._cause_before, self._cause = self._cause, ""
        environment[CAUSE] = self._cause_before
        self._starts[local_rank] = starts + 1
        program = replace(self._worker, name=f"{self._worker.name} {local_rank}")
        pid = self._start(program, [], environment, descriptors)
        for each in descriptors:
            os.close(each)
        self._workers[pid] = _Worker(stub, rank, local_rank, environment.get(ERROR_FILE, ""))
        self._tell({"is": "worker", "pid": pid, "rank": rank, "local_rank": local_rank})

    def _forget(self, stub: socket.socket) -> None:
        if stub.fileno() >= 0:
            self._selector.unregister(stub)
            stub.close()

    # -- children ----------------------------------------------------------------------------------

    def _start(
        self, program: Program, arguments: list[Any], environment: Mapping[str, str],
        descriptors: Sequence[int],
    ) -> int:  # fmt: skip
        """Start a child in a session of its own and return its process id."""
        if not can_fork():
            command = [*program.command, *map(json.dumps, arguments)]
            stdin, stdout, stderr = descriptors
            return subprocess.Popen(  # noqa: S603 our own commands
                command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment,
                start_new_session=True, pass_fds=[self._pulse],
            ).pid  # fmt: skip
        pid = os.fork()
        if not pid:
            self._become(program.name, environment, descriptors)
            _end_with(lambda: program.function(*arguments))
        return pid

    def _become(
        self, name: str, environment: Mapping[str, str], descriptors: Sequence[int]
    ) -> None:
        """Make this child a process of its own: nothing of the zygote's stays open in it.

        The zygote's objects stay referenced up the stack, so that none of them is collected, which
        would close a number that has come to mean something else.
        """
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, name.encode())
        if os.getppid() != self._pid:
            os._exit(EXIT_CRASHED)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, each in enumerate(descriptors):
            os.dup2(each, number)
        os.closerange(3, self._pulse)
        os.closerange(self._pulse + 1, 1 << 16)
        os.environ.clear()
        os.environ.update(environment)

    def _kill(self, pid: int) -> None:
        """Kill a worker and what it has started; not the persister, which has its own session."""
        if pid in self._workers:
            self._workers[pid].was_killed = True
            for kill in (os.killpg, os.kill):  # just started, it may not lead a group yet
                with suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Hear of every child that has ended."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                code = os.waitstatus_to_exitcode(status)
                if pid == self._agent_pid:
                    self._agent_pid = 0
                    if code < 0:
                        self._blame("the agent", ended_by(code))
                    for each in self._workers:
                        self._kill(each)
                    self._tell({"is": "left", "code": code})
                elif worker := self._workers.pop(pid, None):
                    with suppress(OSError):  # it is gone as well
                        worker.stub.send(str(code).encode())
                    self._forget(worker.stub)
                    self._tell(self._ended(pid, worker, code))

    def _blame(self, who: str, error: str) -> None:
        """Remember a failure, unless it follows from another one."""
        text = f"{who}: {error}"[:_MOST_CAUSE_CHARACTERS].replace("\0", " ")
        self._cause = self._cause or text

    def _ended(self, pid: int, worker: _Worker, code: int) -> dict[str, Any]:
        """Describe the end of a worker; the first that was not a consequence is the cause."""
        error = _read_error(worker.error_file)
        if code and code != EXIT_LOST and not worker.was_killed:
            self._blame(f"worker {worker.rank}", error or ended_by(code))
        return {
            "is": "ended", "pid": pid, "rank": worker.rank, "code": code,
            "was_killed": worker.was_killed, "error": error,
        }  # fmt: skip


def can_fork() -> bool:
    """Tell whether forking is safe: it is as long as there is one thread."""
    return len(os.listdir("/proc/self/task")) == 1


def _end_with(function: Callable[[], int]) -> NoReturn:
    """Run a child to its end; nothing of it returns into the zygote's loop."""
    code = EXIT_CRASHED
    try:
        code = function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_CRASHED
    except BaseException:  # noqa: BLE001 the border of the process
        traceback.print_exc()
    os._exit(code)


def _read_error(path: str) -> str:
    """Return what a worker has left of its error, as torch's agent finds it; empty: nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
