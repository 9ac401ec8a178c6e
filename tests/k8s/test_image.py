"""The image and the manifests, run for real by podman: pods are lost and come back."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.elastic.harness import DEADLINE_S, SMALL, as_arguments
from tests.k8s.cluster import Cluster, Pod, cluster, has_image, podman
from tests.k8s.manifests import K8S, build

pytestmark = [pytest.mark.image, pytest.mark.timeout(2400)]

FLAGS = {
    name: value
    for name, value in SMALL.items()
    if name not in {"--snapshot-dir", "--dataset", "--log-format"}
} | {"--dataset": "sudoku4:train?count=96", "--epochs": "100", "--checkpoint-interval": "150"}

ALONE = ["--checkpoint-dir=/tmp/alone", "--cache-dir=/cache", "--spot=none", "--log-format=json"]
"""Of a run that nobody touches, on one worker in one container."""


def world_sizes(pods: Cluster) -> list[int]:
    """The world size of every start so far, in the order of time."""
    starts = [each for pod in pods.all for each in pod.running.events("started")]
    return [each["world_size"] for each in sorted(starts, key=lambda each: each["time"])]


def num_batches(pods: Cluster) -> int:
    return sum(len(pod.running.events("batch")) for pod in pods.all)


def wait_for(pods: Cluster, holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 2 * DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited too long for {what}: " + "\n".join(
            f"{pod.name} {pod.health()} {pod.running.messages()}" for pod in pods.all
        )
        time.sleep(0.02)


def until_batches(pods: Cluster, size: int, change: Callable[[], object]) -> float:
    """Make a change; return the seconds until a world of some size has finished a batch."""
    since, started_s = len(world_sizes(pods)), time.monotonic()
    change()
    wait_for(pods, lambda: size in world_sizes(pods)[since:], f"a world of {size}")
    batches = num_batches(pods)
    wait_for(pods, lambda: num_batches(pods) > batches, "a batch")
    took_s = time.monotonic() - started_s
    wait_for(pods, lambda: num_batches(pods) > batches + 5, "more batches")
    return took_s


def assert_confined(pod: Pod) -> None:
    assert pod.health()["state"] == "training"
    status = dict(line.split(":\t", 1) for line in pod.shell("cat /proc/1/status").splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert {status[each] for each in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert pod.shell("grep ' / ' /proc/mounts").split()[3].startswith("ro,")
    free = pod.shell("for d in / /opt/venv /tmp /cache /dev/shm; do test ! -w $d || echo $d; done")
    assert free.split() == ["/tmp", "/cache", "/dev/shm"]


def peak_memory_bytes(pod: Pod) -> int:
    names = "memory/memory.max_usage_in_bytes memory.peak"  # of cgroups of version 1 and 2
    return int(pod.shell(f"cd /sys/fs/cgroup; cat {names} 2>/dev/null || true").split()[0])


DIGEST = (
    "import hashlib, pathlib, trm_dist; root = pathlib.Path(trm_dist.__file__).parent; "
    "files = [each for each in sorted(root.rglob('*.*')) if each.suffix not in ('.md', '.pyc')]; "
    "print(hashlib.sha256(b''.join(each.read_bytes() for each in files)).hexdigest())"
)


def test_image_holds_the_package_as_it_stands_here() -> None:
    """Not that of an earlier build, from a layer that was kept."""
    if not has_image():
        pytest.skip("needs podman and the image (make test-image)")
    run = ["run", "--rm", "--network=none", "--entrypoint=python3", "localhost/trm_dist:latest"]
    here = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, check=True, text=True, cwd=K8S.parent
    )

    assert podman(*run, "-c", DIGEST) == here.stdout


def test_pods_are_lost_and_come_back_and_the_bits_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took: dict[str, float] = {}
    flags = [*as_arguments(FLAGS), "--hang-timeout=8"]
    trainers: list[Pod] = []
    with cluster(build(K8S / "overlays" / "local"), tmp_path, flags) as pods:

        def start_all() -> None:
            trainers.extend(pods.start("trm", index) for index in range(3))

        def replace(index: int) -> None:
            trainers[index] = pods.start("trm", index)

        pods.start("s3")
        meeting = [pods.start("trm-rendezvous")]

        def replace_rendezvous() -> None:
            meeting[0].kill()
            meeting[0] = pods.start("trm-rendezvous")

        took["three pods to the first batch"] = until_batches(pods, 3, start_all)
        assert_confined(trainers[0])
        took["pod 0 killed"] = until_batches(pods, 2, trainers[0].kill)
        took["its successor"] = until_batches(pods, 3, lambda: replace(0))
        took["rendezvous killed and replaced"] = until_batches(pods, 3, replace_rendezvous)
        took["pod 0 stopped"] = until_batches(pods, 2, trainers[0].stop)
        assert trainers[0].running.end() == 143
        took["its successor again"] = until_batches(pods, 3, lambda: replace(0))
        took["pod 2 cut off (--hang-timeout 8)"] = until_batches(
            pods, 2, lambda: pods.cut(trainers[2])
        )
        took["pod 2 in reach again"] = until_batches(pods, 3, lambda: pods.mend(trainers[2]))
        peak_bytes = max(peak_memory_bytes(pod) for pod in trainers)
        assert not any(pod.running.events("finished") for pod in pods.all), "too short a run"

        assert [pod.running.end() for pod in trainers] == [0, 0, 0]
        assert len(pods.all) == 1 + 2 + 5, "pods 1 and 2 are the first ones"
        looked = pods.start("trm", 3, ["inspect", "--digest", "s3://checkpoints/runs/1"]).running
        assert looked.end() == 0, looked.messages()
        alone = pods.start("trm", 4, ["train", *flags, *ALONE]).running
        assert alone.end() == 0, alone.messages()
        assert looked.output.read_text().strip() == alone.digest()
    with capsys.disabled():
        told = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())
        print(f"\nto the next batch: {told}; peak of a pod {peak_bytes / 2**20:.0f} MiB")  # noqa: T201 what the test is asked to show
