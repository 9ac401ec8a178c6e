"""What is refused before training because kernels cannot be compiled."""

from pathlib import Path
from typing import Literal

import pytest

from trm_dist.cli import main
from trm_dist.elastic.device import check_compiler
from trm_dist.errors import ConfigError


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_what_is_missing_for_a_compiler_is_named(
    device: Literal["cpu", "cuda"], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs .*a C.* compiler.*--no-compile"):
        check_compiler(device, "auto")
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs .*a C.* compiler.*--no-compile"):
        check_compiler(device, "auto")


def test_kernels_of_the_processor_at_hand_are_not_those_of_a_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--dataset", "sudoku4:train?count=20", "--checkpoint-dir", str(tmp_path / "run")]
    flags = ["--device", "cpu", "--compile", "--cpu-capability", "default"]
    assert main(["train", *wanted, *flags]) == 2
    assert capsys.readouterr().err.count("Leave out one of the two") == 1
    assert not (tmp_path / "run").exists()
