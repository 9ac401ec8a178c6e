"""docker/compose.yaml as it stands, by podman-compose: two hosts, the rendezvous, an S3 server."""

import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elastic.harness import DEADLINE_S
from tests.k8s.cluster import has_image, podman, settings

pytestmark = [pytest.mark.image, pytest.mark.timeout(1200)]

FILE = Path(__file__).parents[2] / "docker" / "compose.yaml"


def compose(*arguments: str) -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "podman-compose"), "--file", str(FILE)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, check=False, text=True, timeout=300,
        env=settings(),
    )  # fmt: skip
    assert not done.returncode, done.stderr


@pytest.fixture
def up() -> Iterator[None]:
    if not has_image():
        pytest.skip("needs podman and the image (make test-image)")
    try:
        compose("up", "--detach", "--no-build")
        yield
    finally:
        compose("down", "--volumes", "--timeout", "1")


TRAINERS = ["trm_trainer_1", "trm_trainer_2"]


def said_by(container: str) -> str:
    return podman("logs", container, messages=True)


def count(text: str) -> int:
    """How often the trainers have said something."""
    return sum(said_by(name).count(text) for name in TRAINERS)


def wait_for(text: str, times: int) -> None:
    deadline = time.monotonic() + 2 * DEADLINE_S
    while count(text) < times:
        assert time.monotonic() < deadline, [said_by(each) for each in TRAINERS]
        time.sleep(0.5)


def test_a_killed_host_comes_back_and_training_goes_on(up: None) -> None:
    wait_for("2 worker(s)", 1)
    wait_for("epoch 1 batch", 1)

    together = count("2 worker(s)")
    podman("kill", "--signal", "KILL", TRAINERS[0])
    compose("up", "--detach", "--no-build")
    wait_for("2 worker(s)", together + 1)
    wait_for("resumed from memory", 1)
    assert not count("anew"), "it has met the other one, and not formed a group beside it"
