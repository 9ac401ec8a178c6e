"""The locks of the image hold what the package needs, as constraints.txt has it."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pinned(path: Path) -> dict[str, str]:
    """Versions by name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def needed() -> set[str]:
    """What the package depends on, with the extras that the image has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["export"], *extras["metrics"]]
    return {re.split(r"[<>=\[]", each)[0].lower() for each in wanted}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_lock_of_the_image_has_every_dependency_at_the_tested_version(variant: str) -> None:
    lock = pinned(ROOT / "docker" / f"requirements-{variant}.txt")
    tested = pinned(ROOT / "constraints.txt")

    assert {name: lock.get(name, "").removesuffix("+cpu") for name in needed()} == {
        name: tested[name] for name in needed()
    }
    text = (ROOT / "docker" / f"requirements-{variant}.txt").read_text()
    assert text.count("--hash=sha256:") >= len(lock)
