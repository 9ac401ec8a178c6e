"""One digest at every world size, and through every change of it."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.elastic.harness import Training, Undisturbed, kill, kill_everything, training
from tests.elastic.test_kill import assert_same_bits

NETWORKS = {"mlp": {"--net": "mlp"}, "attn": {"--net": "attn", "--heads": "2"}}

# Few puzzles, which --net mlp soon knows by heart, so that rows halt early and some explore. Every
# second batch has one sample, and five shards.
HALTING = {
    "--dataset": "sudoku4:train?count=6",
    "--batch-size": "5",
    "--dim": "32",
    "--n-sup": "4",
    "--lr": "5e-3",
    "--warmup-steps": "10",
    "--epochs": "20",
}
WIDE = {
    "--dataset": "sudoku4:train?count=256",
    "--batch-size": "128",
    "--shards": "1",
    "--dim": "64",
    "--n-sup": "1",
    "--epochs": "1",
}
LONG = {"--epochs": "24"}  # 240 batches


def alone(directory: Path, flags: dict[str, str], threads: int = 1) -> Undisturbed:
    asked = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with training(directory / f"alone-{threads}", flags=flags, variables=asked) as run:
        assert run.end() == 0, run.messages()
        return Undisturbed(run.losses(), run.digest())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        ("mlp", range(1, 6)),
        ("attn", range(3, 4)),
        pytest.param("attn", range(1, 6), marks=pytest.mark.soak),
    ],
)
def test_every_world_size_gives_one_digest(tmp_path: Path, net: str, sizes: range) -> None:
    flags = NETWORKS[net] | HALTING
    expected = alone(tmp_path, flags)
    for workers in sizes:
        # Three under plain torchrun; the others start faster under launch.
        how = {"workers" if workers == 3 else "launch": workers}
        with training(tmp_path / str(workers), flags=flags, **how) as run:
            assert run.end() == 0, run.messages()
            assert_same_bits([run], expected)
            steps = {each["mean_steps"] for each in run.events("batch")}
            assert net == "attn" or len(steps) > 2, "rows halt, and not all at once"


def test_threads_of_the_environment_change_nothing(tmp_path: Path) -> None:
    assert alone(tmp_path, WIDE, threads=1) == alone(tmp_path, WIDE, threads=2)


PINNED = """
    import os, torch
    from trm_dist.train import pin_numerics
    pin_numerics(1)
    print(torch.get_float32_matmul_precision(), os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_precision_of_the_environment_changes_nothing() -> None:
    shorter = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    command = [sys.executable, "-c", textwrap.dedent(PINNED)]
    found = subprocess.check_output(command, env=os.environ | shorter, text=True)
    assert found.split() == ["highest", ":4096:8"]


def end(run: Training, how: str) -> None:
    if how == "killed":
        kill_everything(run)
        return
    run.process.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGINT)
    assert run.end() != 0


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("net", NETWORKS)
def test_seven_world_sizes_and_many_kills_change_nothing(tmp_path: Path, net: str) -> None:
    flags = NETWORKS[net] | LONG
    expected = alone(tmp_path, flags)
    assert len(expected.losses) >= 200
    chance, runs = random.Random(net), []
    endings = ["killed", "terminated", "interrupted"]
    with ExitStack() as stack:
        for number, workers in enumerate((4, 1, 3, 2, 5, 1, 3)):
            run = stack.enter_context(
                training(tmp_path / "checkpoints", workers=workers, max_restarts=30, flags=flags)
            )
            runs.append(run)
            for kills in range(2):
                run.wait_for_start(kills + 1)
                run.wait_for_batches(chance.randint(2, 12))
                kill(run.worker(chance.randrange(workers)))
            run.wait_for_start(3)
            run.wait_for_batches(chance.randint(2, 8))
            end(run, endings[number % 3])
        last = stack.enter_context(training(tmp_path / "checkpoints", workers=2, flags=flags))
        assert last.end() == 0, last.messages()
        assert_same_bits([*runs, last], expected)
