"""One level of instructions, chosen before torch loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trm_dist.elastic.capability import NEEDS, pin_capability
from trm_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]


def processor(tmp_path: Path, *flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: Some\nflags\t\t: fpu {' '.join(flags)}\n\n" * 2)
    return path


@pytest.mark.parametrize("level", NEEDS)
def test_level_that_the_processor_has_is_told_to_the_libraries(tmp_path: Path, level: str) -> None:
    variables: dict[str, str] = {}

    pin_capability(level, variables, processor(tmp_path, *NEEDS[level]))

    assert variables["ATEN_CPU_CAPABILITY"] == level
    assert set(variables) == {
        "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    }  # fmt: skip


def test_level_that_the_processor_lacks_is_refused(tmp_path: Path) -> None:
    variables: dict[str, str] = {}

    with pytest.raises(ConfigError, match=r"--cpu-capability avx512: .* no avx512bw, avx512dq"):
        pin_capability("avx512", variables, processor(tmp_path, "avx2", "fma"))

    assert variables == {}


def test_processor_that_does_not_say_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no avx2, fma"):
        pin_capability("avx2", {}, tmp_path / "missing")


def test_auto_changes_nothing(tmp_path: Path) -> None:
    variables: dict[str, str] = {}

    pin_capability("auto", variables, processor(tmp_path))

    assert variables == {}


def test_torch_obeys_the_flag() -> None:
    # The double stands where training would begin; torch must have been loaded after the flag.
    script = (
        "import sys, types; double = types.ModuleType('trm_dist.worker');\n"
        "def train(config, given):\n"
        "    import torch; print(torch.backends.cpu.get_cpu_capability()); sys.exit(0)\n"
        "double.train = train; sys.modules['trm_dist.worker'] = double\n"
        "from trm_dist.cli import main; main(['train', '--cpu-capability', 'default'])"
    )
    environment = {name: os.environ[name] for name in os.environ if "CAPABILITY" not in name}
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True
    ).stdout

    assert output.strip() == b"DEFAULT"
