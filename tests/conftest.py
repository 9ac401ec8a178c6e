"""The run that nobody touches, made once; everything else is compared with it."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest

from tests.elastic.harness import Undisturbed, training

# A shell that starts tests in the background lets them ignore Ctrl+C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trm_dist-test-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    directory = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
    with training(directory, workers=2) as run:
        assert run.end() == 0, run.messages()
        losses = run.losses()
        assert sorted(losses) == list(range(1, 81))
        assert all(len(each) == 1 for each in losses.values())
        return Undisturbed(losses, run.digest())
