"""One level of processor instructions on every node, so that a mixed fleet computes the same bits.

Kernels pick their code by what the processor can do, and other code adds up in another order. The
libraries behind torch read the level to use from the environment when they are loaded, so this
runs before torch is imported.

Sources: ATEN_CPU_CAPABILITY in aten/src/ATen/native/DispatchStub.cpp; ONEDNN_MAX_CPU_ISA in
oneDNN's developer guide, "CPU dispatcher control"; MKL_ENABLE_INSTRUCTIONS in that of oneMKL.
"""

from collections.abc import MutableMapping
from pathlib import Path

from trm_dist.errors import ConfigError

NEEDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}),
}
"""What the processor must have for a level, as /proc/cpuinfo names it."""

_VARIABLES: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def pin_capability(
    level: str, environment: MutableMapping[str, str], cpuinfo: Path = Path("/proc/cpuinfo")
) -> None:
    """Let the libraries that are loaded from now on use one level.

    Args:
        level: auto (what the processor has), or a key of `NEEDS`.
        environment: Where they read it.
        cpuinfo: What the processor can do.

    Raises:
        ConfigError: The processor cannot do that.
    """
    if level == "auto":
        return
    missing = NEEDS[level] - _flags(cpuinfo)
    if missing:
        raise ConfigError(
            f"--cpu-capability {level}: this processor has no {', '.join(sorted(missing))}. Give "
            "every node the level of the oldest one."
        )
    environment.update(_VARIABLES[level])


def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())
