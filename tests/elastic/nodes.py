"""Machines as network namespaces of their own, joined by a switch whose ports can be cut.

The switch has a namespace too, so nothing touches the network of the machine under test.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.elastic.harness import SMALL, SNAPSHOTS, Training, as_arguments, started

RECIPE = Path(__file__).parents[2] / "launch" / "many_machines.sh"

_PORT = 29500


class Nodes:
    """A few machines; the first one is where the others meet."""

    def __init__(self, directory: Path, number: int, flags: dict[str, str], least: int) -> None:
        self._directory, self._flags = directory, flags
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
        for each in range(self.number):
            name, port = self._add(f"n{each}"), f"p{each}"
            _ip(f"-n {name} link set lo up")
            _ip(f"link add eth0 netns {name} type veth peer name {port} netns {switch}")
            _ip(f"-n {name} addr add {_address(each)}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {switch} link set {port} master br0 up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for memory in self.memory:
            shutil.rmtree(memory)

    def start(
        self, node: int, flags: dict[str, str] | None = None,
        variables: dict[str, str] | None = None,
    ) -> Training:  # fmt: skip
        """Start the recipe on a machine, as a person there would."""
        wanted = SMALL | {"--checkpoint-dir": str(self._directory)} | self._flags
        wanted |= {"--snapshot-dir": self.memory[node]} | (flags or {})
        command = [
            "ip", "netns", "exec", f"{self._name}n{node}", str(RECIPE),
            f"{_address(0)}:{_PORT}", f"{self._least}:{self.number}", "1", "test-run",
            *as_arguments(wanted),
        ]  # fmt: skip
        common = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # All machines of this test have one host name, which a real one would be known by.
            "IS_HOST": str(int(node == 0)),
            "PET_LOCAL_ADDR": _address(node),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        training = self._stack.enter_context(
            started(self._directory, command, common | (variables or {}))
        )
        self.running[node] = training
        self.all.append(training)
        return training

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
def nodes(directory: Path, number: int, flags: dict[str, str], least: int = 0) -> Iterator[Nodes]:
    """Some machines, gone at the end; training needs all of them, or at least so many."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    with Nodes(directory, number, flags, least or number) as machines:
        yield machines


def _address(node: int) -> str:
    return f"10.77.0.{10 + node}"


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
