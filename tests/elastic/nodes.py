"""Machines as network namespaces of their own, joined by a switch whose ports can be cut.

They run either the recipe for torchrun, where the first one is the one where the others meet, or
`trm_dist launch`, where they meet on one more machine.

The switch has a namespace too, so nothing touches the network of the machine under test.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.elastic.harness import DEADLINE_S, SMALL, SNAPSHOTS, Training, as_arguments, started

RECIPE = Path(__file__).parents[2] / "launch" / "many_machines.sh"

_PORT = 29500


class Nodes:
    """A few machines."""

    def __init__(
        self, directory: Path, number: int, flags: dict[str, str], least: int, *, is_launch: bool
    ) -> None:
        self._directory, self._flags = directory, flags
        self._is_launch = is_launch
        self.rendezvous: Training | None = None
        """The process where they meet, under `trm_dist launch`."""
        self._name = f"td{os.getpid()}"
        self._stack = ExitStack()
        self.number, self._least = number, least
        self.running: dict[int, Training] = {}
        """The training of each machine that was started, the latest one."""
        self.all: list[Training] = []
        """Every training that was started."""
        self.memory = [tempfile.mkdtemp(dir=SNAPSHOTS) for _ in range(number)]

    def __enter__(self) -> Self:
        switch = self._add("sw")
        _ip(f"-n {switch} link add br0 type bridge")
        _ip(f"-n {switch} link set br0 up")
        for each in range(self.number + self._is_launch):
            name, port = self._add(f"n{each}"), f"p{each}"
            _ip(f"-n {name} link set lo up")
            _ip(f"link add eth0 netns {name} type veth peer name {port} netns {switch}")
            _ip(f"-n {name} addr add {_address(each)}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {switch} link set {port} master br0 up")
        if self._is_launch:
            self.start_rendezvous()
        return self

    def start_rendezvous(self) -> None:
        """Start the process where they meet, at the same address each time."""
        self.rendezvous = self._start(
            self.number, ["rendezvous", "--host", _address(self.number), "--port", str(_PORT)]
        )

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for memory in self.memory:
            shutil.rmtree(memory)

    def start(
        self, node: int, flags: dict[str, str] | None = None,
        variables: dict[str, str] | None = None,
    ) -> Training:  # fmt: skip
        """Start training on a machine, as a person there would."""
        wanted = SMALL | {"--checkpoint-dir": str(self._directory)} | self._flags
        wanted |= {"--snapshot-dir": self.memory[node]} | (flags or {})
        span = f"{self._least}:{self.number}"
        if self._is_launch:
            wanted |= {"--nnodes": span, "--rdzv-endpoint": f"{_address(self.number)}:{_PORT}"}
            wanted |= {"--local-addr": _address(node)}
            training = self._start(node, ["launch", *as_arguments(wanted)], variables)
        else:
            recipe = [str(RECIPE), f"{_address(0)}:{_PORT}", span, "1", "test-run"]
            # All machines of this test have one host name, which a real one would be known by.
            known = {"IS_HOST": str(int(node == 0)), "PET_LOCAL_ADDR": _address(node)}
            training = self._start(
                node, [*recipe, *as_arguments(wanted)], known | (variables or {})
            )
        self.running[node] = training
        self.all.append(training)
        return training

    def _start(
        self, node: int, command: list[str], variables: dict[str, str] | None = None
    ) -> Training:
        if not command[0].startswith("/"):
            command = [sys.executable, "-m", "trm_dist", *command]
        common = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        there = ["ip", "netns", "exec", f"{self._name}n{node}"]
        return self._stack.enter_context(
            started(self._directory, [*there, *command], common | (variables or {}))
        )

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds, as long as a machine is training."""
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            said = [each.messages() for each in self.all]
            is_alive = any(each.process.poll() is None for each in self.running.values())
            assert is_alive, f"all have ended before {what}: {said}"
            assert time.monotonic() < deadline, f"waited too long for {what}: {said}"
            time.sleep(0.01)

    def cut(self, node: int) -> None:
        """Pull the cable: nobody is told, and packets vanish."""
        _ip(f"-n {self._name}sw link set p{node} down")

    def mend(self, node: int) -> None:
        """Plug it in again."""
        _ip(f"-n {self._name}sw link set p{node} up")

    def _add(self, name: str) -> str:
        full = f"{self._name}{name}"
        _ip(f"netns add {full}")
        self._stack.callback(_ip, f"netns del {full}")
        return full


@contextmanager
def nodes(
    directory: Path, number: int, flags: dict[str, str], least: int = 0, *, is_launch: bool = False
) -> Iterator[Nodes]:
    """Some machines, gone at the end; training needs all of them, or at least so many."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    with Nodes(directory, number, flags, least or number, is_launch=is_launch) as machines:
        yield machines


def _address(node: int) -> str:
    return f"10.77.0.{10 + node}"


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
