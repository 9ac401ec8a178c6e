"""Pods as containers: podman runs them as the manifests say, and a test is the Job controller.

Each container gets the image, arguments, variables, user, capabilities, read-only root, limits and
volumes of the manifest. A Service is a line in /etc/hosts that names an address which stays, as a
ClusterIP does. The network is a private one without a way out.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from tests.elastic.harness import Training, started
from tests.k8s.manifests import Object, arguments, quantity, variables

_CONFIG = Path(__file__).with_name("containers.conf")
_NAMES = itertools.count()
_ASK = (
    "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/healthz').read().decode())"
)


class Cluster:
    """One private network, and the pods in it."""

    def __init__(self, objects: list[Object], directory: Path, flags: list[str]) -> None:
        self.objects, self._directory, self._flags = objects, directory, flags
        self._mark = f"trm{os.getpid()}n{next(_NAMES)}"
        self._subnet = f"10.{os.getpid() % 200 + 40}.{next(_NAMES) % 256}"
        self._hosts = itertools.count(2)
        self._stack = ExitStack()
        self._services = {
            each["metadata"]["name"]: (each["spec"]["selector"], self._address())
            for each in objects
            if each["kind"] == "Service"
        }
        self.all: list[Pod] = []
        """Every pod that was started."""

    def __enter__(self) -> Self:
        network = ["network", "create", "--internal", "--disable-dns"]
        podman(*network, "--subnet", f"{self._subnet}.0/24", self._mark)
        self._stack.callback(podman, "network", "rm", "--force", self._mark)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.all:
            self._stack.callback(podman, "rm", "--force", "--ignore", "--time", "0", each.name)
        self._stack.close()

    def start(self, workload: str, index: int = 0, command: list[str] | None = None) -> "Pod":
        """Start a pod of a Job or a Deployment.

        Args:
            workload: Its name.
            index: Of a Job with several pods.
            command: Instead of the manifest's arguments.
        """
        (owner,) = (
            each
            for each in self.objects
            if each["kind"] in {"Job", "Deployment"} and each["metadata"]["name"] == workload
        )
        template = owner["spec"]["template"]
        served = [
            address
            for selector, address in self._services.values()
            if selector.items() <= template["metadata"]["labels"].items()
        ]
        address = served[0] if served else self._address()
        name = f"{self._mark}-{workload}-{index}-{len(self.all)}"
        (container,) = template["spec"]["containers"]
        environment = variables(
            container,
            self.objects,
            {
                "status.podIP": address,
                "metadata.labels['batch.kubernetes.io/controller-uid']": self._mark,
            },
        )
        given = arguments(container, environment) + self._flags * (owner["kind"] == "Job")
        options = self._options(template["spec"], address)
        options += [f"--env={key}={value}" for key, value in environment.items()]
        options += [f"--entrypoint={each}" for each in container.get("command", [])]
        run = ["podman", "run", f"--name={name}", f"--hostname={workload}-{index}", *options]
        running = self._stack.enter_context(
            started(
                self._directory / name,
                [*run, container["image"], *(command or given)],
                {"CONTAINERS_CONF": str(_CONFIG)},
            )
        )
        grace_s = template["spec"].get("terminationGracePeriodSeconds", 30)
        pod = Pod(name, address, running, grace_s)
        self.all.append(pod)
        return pod

    def cut(self, pod: "Pod") -> None:
        """Take a pod off the network; nobody is told."""
        podman("network", "disconnect", self._mark, pod.name)

    def mend(self, pod: "Pod") -> None:
        """Bring it back at the same address."""
        there = [f"--ip={pod.address}", f"--mac-address={_hardware(pod.address)}"]
        podman("network", "connect", *there, self._mark, pod.name)

    def _address(self) -> str:
        return f"{self._subnet}.{next(self._hosts)}"

    def _options(self, spec: Object, address: str) -> list[str]:
        """What podman is told about a pod of one container."""
        (container,) = spec["containers"]
        security = spec["securityContext"] | container["securityContext"]
        limits = container["resources"]["limits"]
        options = [
            f"--network={self._mark}",
            f"--ip={address}",
            f"--mac-address={_hardware(address)}",
            "--dns=127.0.0.1",  # refuses at once, where none would be waited for
            *(f"--add-host={name}:{each}" for name, (_, each) in self._services.items()),
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            f"--read-only={str(security['readOnlyRootFilesystem']).lower()}",
            "--read-only-tmpfs=false",
            *(f"--cap-drop={each}" for each in security["capabilities"]["drop"]),
            f"--memory={int(quantity(limits['memory']))}",
            f"--cpus={quantity(limits['cpu'])}",
        ]
        if not security["allowPrivilegeEscalation"]:
            options.append("--security-opt=no-new-privileges")
        sizes = {each["name"]: each["emptyDir"] for each in spec["volumes"]}
        for mount in container["volumeMounts"]:
            size = int(quantity(sizes[mount["name"]]["sizeLimit"]))
            if mount["mountPath"] == "/dev/shm":
                options.append(f"--shm-size={size}")
            else:
                options.append(f"--tmpfs={mount['mountPath']}:rw,mode=1777,size={size}")
        return options


class Pod:
    """A container, its output, and the process of podman that waits for it."""

    def __init__(self, name: str, address: str, running: Training, grace_s: int) -> None:
        self.name, self.address, self.running = name, address, running
        self._grace_s = grace_s

    def kill(self) -> None:
        """Kill all of it with SIGKILL."""
        podman("kill", "--signal", "KILL", self.name)
        self.running.end()

    def stop(self) -> int:
        """Stop it as a kubelet does, and return the exit code."""
        podman("stop", "--time", str(self._grace_s), self.name)
        return self.running.end()

    def health(self) -> dict[str, Any]:
        """What its health port answers; empty: nothing yet."""
        try:
            found: dict[str, Any] = json.loads(podman("exec", self.name, "python3", "-c", _ASK))
        except AssertionError:
            return {}
        return found

    def shell(self, script: str) -> str:
        """Run a line of shell in it and return what it prints."""
        return podman("exec", self.name, "sh", "-c", script)


def _hardware(address: str) -> str:
    """The same for whoever has an address, as nobody forgets an old one for a minute."""
    return ":".join(["02", "00", *(f"{int(each):02x}" for each in address.split("."))])


def podman(*arguments: str, messages: bool = False) -> str:
    """Run podman and return what it prints; with its messages among it, if they are wanted."""
    done = subprocess.run(
        ["podman", *arguments], check=False, text=True, timeout=600, env=settings(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT if messages else subprocess.PIPE,
    )  # fmt: skip
    assert not done.returncode, f"podman {' '.join(arguments)}:\n{done.stderr}"
    return done.stdout


def settings() -> dict[str, str]:
    """The environment that podman needs."""
    return os.environ | {"CONTAINERS_CONF": str(_CONFIG)}


def has_image() -> bool:
    """Whether there are podman and the image."""
    try:
        podman("image", "exists", "localhost/trm_dist:latest")
    except (OSError, AssertionError):
        return False
    return True


@contextmanager
def cluster(objects: list[Object], directory: Path, flags: list[str]) -> Iterator[Cluster]:
    """A cluster, gone at the end.

    Args:
        objects: The manifests.
        directory: Where the output of the pods goes.
        flags: Of the trainer, after those of the manifest, of which the last one counts.
    """
    if not has_image():
        pytest.skip("needs podman and the image (make test-image)")
    with Cluster(objects, directory, flags) as there:
        yield there
