"""What the tools of others say about manifests, image and scripts."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S

ROOT = K8S.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))

YAML_RULES = (
    "{extends: default, rules: {document-start: disable, comments-indentation: disable, "
    "line-length: {max: 100, allow-non-breakable-inline-mappings: true}, "
    "braces: {max-spaces-inside: 0}}}"
)


@pytest.mark.parametrize(
    "command",
    [
        ["yamllint", "--strict", "-d", YAML_RULES, "k8s", "docker"],
        ["hadolint", "docker/Dockerfile"],
        ["shellcheck", "tests/k8s/build_image.sh", "launch/many_machines.sh", ".ci/run"],
    ],
    ids=lambda command: command[0],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    name, *rest = command
    done = subprocess.run(
        [str(SCRIPTS / name), *rest],
        cwd=ROOT, capture_output=True, check=False, text=True, timeout=60,
    )  # fmt: skip

    assert not done.returncode, done.stdout + done.stderr
