"""kubectl itself, unmodified, with the manifests and a double of the API server."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.api_server import ApiServer, api_server
from tests.k8s.manifests import JOB, K8S, KUBECTL


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


def kubectl(server: ApiServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(KUBECTL), f"--server={server.url}", f"--cache-dir={home}", *arguments],
        env={"HOME": str(home), "KUBECONFIG": "/dev/null", "PATH": "/usr/bin:/bin"},
        capture_output=True, check=False, text=True, timeout=60,
    )  # fmt: skip


def test_job_is_applied_compared_and_deleted(server: ApiServer, tmp_path: Path) -> None:
    applied = kubectl(server, tmp_path, "apply", "-f", str(JOB))
    assert not applied.returncode, applied.stderr
    assert applied.stdout.count(" created\n") == len(server.objects) == 8

    again = kubectl(server, tmp_path, "apply", "-f", str(JOB))
    # kubectl sends the selector of a disruption budget every time, changed or not.
    assert again.stdout.count(" unchanged\n") == 7, again.stdout + again.stderr

    same = kubectl(server, tmp_path, "diff", "-f", str(JOB))
    assert (same.returncode, same.stdout) == (0, ""), same.stdout + same.stderr

    changed = tmp_path / "changed.yaml"
    changed.write_text(JOB.read_text().replace("minAvailable: 2 ", "minAvailable: 3 "))
    difference = kubectl(server, tmp_path, "diff", "-f", str(changed))
    assert difference.returncode == 1
    assert "+  minAvailable: 3" in difference.stdout, difference.stdout + difference.stderr

    deleted = kubectl(server, tmp_path, "delete", "--wait=false", "-f", str(JOB))
    assert not deleted.returncode, deleted.stderr
    assert server.objects == {}


def test_field_that_no_server_knows_is_refused(server: ApiServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(JOB.read_text().replace("backoffLimitPerIndex", "backoffLimitPerindex"))

    applied = kubectl(server, tmp_path, "apply", "-f", str(broken))

    assert applied.returncode == 1
    assert "backoffLimitPerindex" in applied.stderr


def test_commands_at_the_top_of_the_job_work(server: ApiServer, tmp_path: Path) -> None:
    """Those that change something: to scale, to pause, to stop, and to go on with other data."""
    kubectl(server, tmp_path, "apply", "-f", str(JOB))
    scale, pause, stop = (
        line.split("kubectl ", 1)[1].split("       ")[0].replace("'", "").split()
        for line in JOB.read_text().splitlines()
        if line.startswith(("# Scale", "# Pause", "# Stop"))
    )

    for command in (scale, pause):
        patched = kubectl(server, tmp_path, *command)
        assert not patched.returncode, patched.stderr
    (job,) = (each for each in server.objects.values() if each["kind"] == "Job")
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (8, 8)
    assert job["spec"]["suspend"] is True

    stopped = kubectl(server, tmp_path, *stop, "--wait=false")
    assert not stopped.returncode, stopped.stderr
    applied = kubectl(server, tmp_path, "apply", "-f", str(JOB))
    assert applied.stdout.count(" created\n") == 2


def test_local_overlay_is_applied_and_deleted(server: ApiServer, tmp_path: Path) -> None:
    overlay = str(K8S / "overlays" / "local")

    applied = kubectl(server, tmp_path, "apply", "-k", overlay)
    assert applied.stdout.count(" created\n") == 11, applied.stdout + applied.stderr

    kubectl(server, tmp_path, "delete", "--wait=false", "-k", overlay)
    assert server.objects == {}
