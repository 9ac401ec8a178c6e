"""What a start does not wait for: nothing is imported that a training on puzzles does without."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.elastic.harness import SMALL, as_arguments, started, training

HEAVY = {
    "torch._dynamo", "torch._inductor", "sympy", "fsspec", "botocore", "jinja2", "safetensors",
    "prometheus_client", "trm_dist.report", "trm_dist.checkpoint.remote", "trm_dist.checkpoint.s3",
}  # fmt: skip
"""Each of them takes from 20 ms to as long as torch itself."""


@pytest.mark.parametrize("way", [{}, {"launch": 2}, {"workers": 2}], ids=str)
def test_training_imports_nothing_heavy_that_it_does_without(
    directory: Path, way: dict[str, Any]
) -> None:
    told = {"PYTHONPROFILEIMPORTTIME": "1"}

    with training(directory, flags={"--epochs": "1"}, variables=told, **way) as run:
        assert run.end() == 0, run.messages()

    lines = run.errors.read_text().splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    assert "trm_dist.train" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["train", "launch"])
def test_training_goes_on_without_streams(directory: Path, command: str, closed: str) -> None:
    flags = as_arguments(SMALL | {"--checkpoint-dir": str(directory), "--epochs": "1"})
    line = shlex.join([sys.executable, "-m", "trm_dist", command, *flags])

    with started(directory, ["sh", "-c", f"exec {line} {closed}"]) as run:
        assert run.end() == 0

    assert (directory / "checkpoint_final.pt").exists()
