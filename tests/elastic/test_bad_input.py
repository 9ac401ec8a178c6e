"""Bad input: one clear message, exit code 2, nothing lost. `check` and `train` say the same."""

import json
import pickle
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.elastic.harness import kill, small_file_system, training
from trm_dist.cli import main

GOOD = {"context": "c", "query": "q", "completion": "a"}

DATA = {
    "broken JSON": ("a.json", '[{"context": "c",\n "query" "q"}]', "line 2, column 10"),
    "broken JSONL": ("a.jsonl", json.dumps(GOOD) + "\n{oops}\n", "line 2, column 2"),
    "no keys": ("a.json", json.dumps([GOOD, {"text": "t"}]), "record 1"),
    "empty": ("a.json", "[]", "holds no records"),
    "not a list": ("a.json", "{}", "neither a list of records"),
    "overlong": ("a.json", json.dumps([GOOD | {"completion": "a" * 99}]), "leaves none"),
    "few": ("a.json", json.dumps([GOOD]), "larger than the data"),
}
FLAGS = {
    "missing file": (["--dataset", "no/such.json"], "no such file"),
    "no data set": ([], "--dataset is missing"),
    "length": (["--dataset", "sudoku4:train", "--seq-len", "20"], "does not fit"),
    "shards": (["--dataset", "sudoku4:train", "--shards", "3"], "does not divide"),
    "heads": (
        ["--dataset", "sudoku4:train", "--net", "attn", "--heads", "5"],
        "--heads 5 does not divide",
    ),
    "unknown flag": (["--dataset", "sudoku4:train", "--epoch", "3"], "--epochs"),
    "no bucket": (["--dataset", "sudoku4:train", "--checkpoint-dir", "s3://"], "names no bucket"),
    "no such store": (["--dataset", "sudoku4:train", "--checkpoint-dir", "x9://a/b"], "x9://a/b"),
    "store in memory": (["--dataset", "sudoku4:train", "--checkpoint-dir", "memory://a"], "gone"),
    "save as a checkpoint": (
        ["--dataset", "sudoku4:train?count=50", "--save", "x/checkpoint_final.pt"],
        "name of its own",
    ),
    "save nowhere": (["--dataset", "sudoku4:train?count=50", "--save", "/proc/no/m.pt"], "--save"),
    "save to no bucket": (["--dataset", "sudoku4:train", "--save", "s3://m.pt"], "s3://"),
    "puzzles": (["--dataset", "sudoku4:train?count=x"], "not a set of puzzles"),
    "no GPU": (["--dataset", "sudoku4:train", "--device", "cuda"], "--device cuda: "),
    "no GPU for NCCL": (["--dataset", "sudoku4:train", "--backend", "nccl"], "--backend nccl "),
}


def test_rendezvous_takes_only_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rendezvous", "--port", "65536"]) == 2
    assert capsys.readouterr().err == "trm_dist: --port 65536 is not a port.\n"


NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"--device": "cuda"}, "--device cuda: "),
        ({"--backend": "nccl"}, "--backend nccl carries gradients from GPU to GPU"),
    ],
)
def test_what_needs_a_gpu_is_told_once_where_there_is_none(
    tmp_path: Path, asked: dict[str, str], expected: str
) -> None:
    with training(tmp_path / "c", flags=asked, workers=2, variables=NO_GPUS) as run:
        assert run.end() != 0
        assert run.errors.read_text().count(f"trm_dist: {expected}") == 1
        assert not run.events("batch")


FULL_GPU = """
    import sys, torch
    from trm_dist.cli import main
    from trm_dist.model.trm import Trm
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 MiB. GPU 0 has ...")
    Trm.forward = forward
    sys.exit(main(sys.argv[1:]))
"""


def test_a_gpu_without_memory_is_told_in_a_message(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FULL_GPU), "train"]
    flags = ["--dataset", "sudoku4:train?count=50", "--checkpoint-dir", str(tmp_path / "c")]
    found = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "CUDA out of memory. Tried to allocate 9 MiB. Start fewer workers" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("case", DATA)
def test_bad_data_are_named(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = DATA[case]
    path = tmp_path / name
    path.write_text(content)
    where = ["--dataset", str(path), "--checkpoint-dir", str(tmp_path / "c")]
    assert main([command, *where, "--seq-len", "32", "--overlong", "drop"]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_named(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags, expected = FLAGS[case]
    assert main([command, *flags]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "check"])
def test_directory_that_cannot_be_written_is_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    where = ["--checkpoint-dir", str(tmp_path / "file" / "below")]
    assert main([command, "--dataset", "sudoku4:train?count=50", *where]) == 2
    assert "cannot be" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/.trm_dist", "read-only"])
def test_directory_that_cannot_be_written_is_told_once_by_launch(
    place: str, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    with ExitStack() as stack:
        if place == "read-only":
            stack.enter_context(small_file_system(directory, "1m"))
            subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        else:
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_text("not a directory")
        with training(directory, launch=1) as run:
            assert run.end() == 2
    assert run.messages().count("Mend that or choose another") == 1


def test_directory_that_is_lost_to_a_file_is_the_last_word_of_launch(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    flags = {"--epochs": "1000", "--checkpoint-interval": "100000"}
    with training(directory, launch=1, flags=flags) as run:
        run.wait_for_batches(5)
        (directory / ".trm_dist").rename(directory / "aside")
        (directory / ".trm_dist").write_text("not a directory")
        kill(run.named("trm worker 0"))
        assert run.end() == 2
    assert run.messages().rstrip().endswith("Mend that or choose another.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "checkpoints"
    with training(directory, flags={"--epochs": "1"}) as run:
        assert run.end() == 0, run.messages()
    return directory


def listing(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}


def refused(finished: Path, flags: list[str]) -> None:
    before = listing(finished)
    where = ["--checkpoint-dir", str(finished), *flags]
    assert main(["train", *where]) == 2
    assert main(["check", *where]) == 2
    assert listing(finished) == before


def test_every_mismatch_is_listed_at_once(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(finished, ["--dim", "64", "--seed", "7", "--batch-size", "20", "--depth", "2"])
    message = capsys.readouterr().err
    assert "--dim: stored 16, given 64" in message
    assert "--seed: stored 0, given 7" in message
    assert "--batch-size: stored 10, given 20" in message
    assert "--depth" not in message


def test_changed_data_are_refused_and_can_be_allowed(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--dataset", "sudoku4:train?count=96&seed=1"]
    refused(finished, other)
    assert "--allow-dataset-change" in capsys.readouterr().err
    where = ["--checkpoint-dir", str(finished), "--allow-dataset-change"]
    assert main(["check", *where, *other]) == 0


def test_other_handling_of_long_records_is_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, directory = tmp_path / "a.json", tmp_path / "checkpoints"
    path.write_text(json.dumps([GOOD] * 8 + [GOOD | {"completion": "a" * 99}] * 8))
    flags = {"--dataset": str(path), "--eval-dataset": str(path), "--seq-len": "32"}
    with training(
        directory, flags=flags | {"--batch-size": "4", "--shards": "2", "--epochs": "1"}
    ) as run:
        assert run.end() == 0, run.messages()
    refused(directory, ["--overlong", "drop", "--epochs", "2"])
    assert "had 16 samples" in capsys.readouterr().err


def test_data_of_another_kind_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD] * 20))
    refused(finished, ["--dataset", str(path), "--eval-dataset", "", "--allow-dataset-change"])
    assert "tokens" in capsys.readouterr().err


def test_resume_never_refuses_a_used_directory(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(finished, ["--resume", "never", "--dataset", "sudoku4:train?count=96"])
    assert "--overwrite" in capsys.readouterr().err


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["missing", "torn", "format", "malicious", "directory"])
def test_bad_resume_path_is_refused_and_never_executed(
    kind: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, marker = tmp_path / "given.pt", tmp_path / "executed"
    if kind == "torn":
        path.write_bytes((finished / "checkpoint_final.pt").read_bytes()[:-5000])
    elif kind == "format":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "malicious":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    elif kind == "directory":
        path.mkdir()
    refused(finished, ["--resume", str(path)])
    assert str(path) in capsys.readouterr().err
    assert not marker.exists()


def test_malicious_file_under_a_documented_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, marker = tmp_path / "checkpoints", tmp_path / "executed"
    directory.mkdir()
    (directory / "checkpoint_latest.pt").write_bytes(pickle.dumps(Malicious(marker)))
    flags = ["--dataset", "sudoku4:train?count=96", "--checkpoint-dir", str(directory)]
    assert main(["train", *flags]) == 2
    assert "none of them is valid" in capsys.readouterr().err
    assert not marker.exists()


def test_check_of_good_input_says_what_a_run_would_be(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--checkpoint-dir", str(finished)]) == 0
    told = capsys.readouterr().out
    assert "dim = 16 (stored)" in told
    assert "all checks passed" in told
