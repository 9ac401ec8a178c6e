"""The run that nobody touches, made once; everything else is compared with it."""

from pathlib import Path

import pytest

from tests.elastic.harness import Undisturbed, training


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/elastic/" in str(item.path):
            item.add_marker("elastic")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    directory = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
    with training(directory, workers=2) as run:
        assert run.end() == 0, run.messages()
        losses = run.losses()
        assert sorted(losses) == list(range(1, 81))
        assert all(len(each) == 1 for each in losses.values())
        return Undisturbed(losses, run.digest())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
