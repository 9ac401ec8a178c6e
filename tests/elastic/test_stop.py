"""Stops: everything that was finished is saved, and the exit code says what happened."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.elastic.harness import DEADLINE_S, SMALL, Undisturbed, kill, started, training
from tests.elastic.test_kill import assert_same_bits
from trm_dist.cli import main


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_signal_saves_the_last_finished_batch_and_exits(
    directory: Path, signum: int, code: int
) -> None:
    with training(directory, flags={"--checkpoint-interval": "1000"}) as run:
        run.wait_for_batches(10)
        run.process.send_signal(signum)
        assert run.end() == code
        finished = run.events("batch")[-1]["batch_count"]
    latest = torch.load(directory / "checkpoint_latest.pt")
    assert latest["batch_count"] >= finished


def test_ctrl_c_and_the_same_command_go_on_with_the_same_bits(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, workers=2) as first:
        first.wait_for_batches(17)
        first.process.send_signal(signal.SIGINT)
        assert first.end() != 0
    with training(directory, workers=2) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)
    replayed = first.losses().keys() & second.losses().keys()
    assert not replayed, "a stop loses nothing that was finished"


def test_sigterm_to_one_worker_restarts_the_group(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, workers=2, max_restarts=3) as run:
        run.wait_for_batches(9)
        kill(run.worker(1), signal.SIGTERM)
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
    assert len(run.events("started")) == 2


def test_loss_that_is_not_finite_stops_with_the_samples(directory: Path) -> None:
    with training(directory, flags={"--lr": "1e30", "--warmup-steps": "0"}) as run:
        assert run.end() == 1
    assert "samples: [" in run.messages()
    assert "--on-nan skip" in run.messages()


def test_batches_that_are_not_finite_can_be_skipped(directory: Path) -> None:
    flags = {"--lr": "1e30", "--warmup-steps": "0", "--on-nan": "skip", "--epochs": "1"}
    with training(directory, flags=flags) as run:
        assert run.end() == 0, run.messages()
    assert run.events("skipped")
    assert len(run.events("batch")) == 10


def test_wrong_usage_is_told_once_and_never_retried(directory: Path) -> None:
    with training(directory, workers=2, max_restarts=20, flags={"--batch-sice": "3"}) as run:
        assert run.end() != 0
    assert run.messages().count("Perhaps you meant") == 1


def test_missing_data_are_told_once_and_never_retried(directory: Path) -> None:
    with training(directory, workers=2, max_restarts=20, flags={"--dataset": "no.json"}) as run:
        assert run.end() != 0
    assert run.messages().count("there is no such file") == 1


@pytest.mark.parametrize(
    "count", [2, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_every_finished_run_exits_zero(tmp_path: Path, count: int) -> None:
    codes = []
    for number in range(count):
        directory = tmp_path / str(number) / "checkpoints"
        directory.parent.mkdir()
        with training(directory, workers=2, flags={"--epochs": "1"}) as run:
            codes.append(run.end())
    assert codes == [0] * count


def test_run_at_its_total_says_so_and_exits_zero(directory: Path) -> None:
    for _ in range(2):
        with training(directory, flags={"--epochs": "1"}) as run:
            assert run.end() == 0, run.messages()
    assert run.events("batch") == []
    assert "already at its total" in run.messages()


def test_epochs_can_be_raised_and_other_settings_come_from_the_checkpoint(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory, flags={"--epochs": "5"}) as first:
        assert first.end() == 0, first.messages()
    with training(directory, base={}, flags={"--epochs": "8"}) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)


TORCHRUN = ["torch.distributed.run", "--nproc_per_node=2", "-m", "trm_dist", "train"]


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, ["trm_dist", "launch", "--nproc-per-node=2"]], ids=["torchrun", "launch"]
)
def test_launcher_as_process_1_trains_as_in_a_container(
    directory: Path, launcher: list[str]
) -> None:
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process 1 of its own needs root")
    flags = [part for pair in SMALL.items() for part in pair]
    command = [*alone, sys.executable, "-m", *launcher, *flags, "--epochs=1"]
    with started(directory, [*command, "--checkpoint-dir", str(directory)]) as run:
        assert run.end() == 0, run.messages()
    assert len(run.events("batch")) == 10


def test_last_batch_is_saved_although_nobody_reads_the_messages(directory: Path) -> None:
    """The shell closes the reader of stderr; training then ends with an error to tell."""
    flags = SMALL | {"--lr": "1e30", "--warmup-steps": "0", "--checkpoint-dir": str(directory)}
    train = [sys.executable, "-m", "trm_dist", "train"]
    train += [part for pair in flags.items() for part in pair]
    with subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(DEADLINE_S) == 1
    assert (directory / "checkpoint_latest.pt").is_file()


def test_damaged_final_checkpoint_of_a_finished_run_is_written_again(directory: Path) -> None:
    flags = {"--epochs": "1"}
    with training(directory, flags=flags) as run:
        assert run.end() == 0
    final = directory / "checkpoint_final.pt"
    data = bytearray(final.read_bytes())
    data[len(data) // 2] ^= 1
    final.unlink()
    final.write_bytes(data)
    with training(directory, flags=flags) as again:
        assert again.end() == 0, again.messages()
    assert main(["verify", str(directory)]) == 0
