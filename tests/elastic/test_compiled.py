"""--compile: kernels that torch's compiler writes give one digest, however often it writes them."""

from pathlib import Path

import pytest

from tests.elastic.harness import Undisturbed, kill, training
from tests.elastic.test_kill import assert_same_bits

FLAGS = {"--compile": "", "--epochs": "2", "--device": "cpu"}
NETS = {"mlp": {}, "attn": {"--net": "attn", "--heads": "2"}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("net", "are_kept"),
    [
        ("mlp", True),
        pytest.param("mlp", False, marks=pytest.mark.soak),
        pytest.param("attn", False, marks=pytest.mark.soak),
    ],
)
def test_compiled_kernels_give_one_digest_through_kills(
    tmp_path: Path, net: str, are_kept: bool
) -> None:
    flags = FLAGS | NETS[net]
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    with training(tmp_path / "alone", flags=flags, variables=variables) as run:
        assert run.end() == 0, run.messages()
        expected = Undisturbed(run.losses(), run.digest())
    if not are_kept:
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled-anew")}
    with training(tmp_path / "run", flags=flags, launch=2, variables=variables) as run:
        for starts, victim in enumerate((1, 0), start=2):
            run.wait_for_batches(4)
            kill(run.named(f"trm worker {victim}"))  # forked: the compiler has started no thread
            run.wait_for_start(starts)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], expected)
    _goes_on_compiled_unless_told(tmp_path / "alone", tmp_path)


def _goes_on_compiled_unless_told(run_directory: Path, empty: Path) -> None:
    flags = {"--epochs": "3", "--device": "cpu"}
    variables = {"CXX": str(empty)}
    with training(run_directory, base={}, flags=flags, variables=variables) as run:
        assert run.end() == 2, run.messages()
        assert "needs a C++ compiler" in run.messages()
    flags |= {"--no-compile": "", "--log-format": "json"}
    with training(run_directory, base={}, flags=flags, variables=variables) as run:
        assert run.end() == 0, run.messages()
        assert run.events("finished")


def test_a_launch_that_cannot_compile_says_so_once_and_ends(tmp_path: Path) -> None:
    nothing = {"CXX": str(tmp_path)}
    with training(tmp_path / "run", flags=FLAGS, launch=2, variables=nothing) as run:
        assert run.end() == 2, run.messages()
        assert run.messages().count("needs a C++ compiler") == 1
    assert not (tmp_path / "run").exists()
