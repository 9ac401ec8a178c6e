"""The run that nobody touches, made once; everything else is compared with it."""

import pytest

from tests.elastic.harness import Undisturbed, training


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    directory = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
    with training(directory, workers=2) as run:
        assert run.end() == 0, run.messages()
        losses = run.losses()
        assert sorted(losses) == list(range(1, 81))
        assert all(len(each) == 1 for each in losses.values())
        return Undisturbed(losses, run.digest())
