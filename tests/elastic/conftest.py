"""Real processes: they are marked, and each test has a directory of its own."""

import socket
from pathlib import Path

import pytest

from tests.elastic.harness import SNAPSHOTS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/elastic/" in str(item.path):
            item.add_marker("elastic")


@pytest.fixture(autouse=True)
def _no_snapshots_of_others() -> None:
    """Lose what a run of another test has left in memory, where it would lie for an hour."""
    for each in Path(SNAPSHOTS).iterdir():
        if each.is_file():
            each.unlink()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
