"""What `trm_dist predict` shows of models that were really trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from tests.elastic.harness import Training, training
from trm_dist.cli import main
from trm_dist.data.sudoku import BLANK
from trm_dist.predict import Answer, _draw_puzzle, _draw_text

LEARNING = {
    "--dataset": "sudoku4:train?count=600",
    "--batch-size": "40",
    "--dim": "32",
    "--lr": "5e-3",
    "--epochs": "2",
}


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of a run, `model.pt`, and `evaluation.json`."""
    directory = tmp_path_factory.mktemp("puzzles")
    flags = LEARNING | {"--save": str(directory / "model.pt")}
    with training(directory / "run", flags=flags) as run:
        evaluation = finished(run).events("evaluated")[-1]
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    return directory


def finished(run: Training) -> Training:
    assert run.end() == 0, run.messages()
    return run


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["predict", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_answers_are_those_that_the_evaluation_counted(
    puzzles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = json.loads((puzzles / "evaluation.json").read_text())

    answers = predicted(capsys, str(puzzles / "run"), "--count", "1000")

    assert [each["number"] for each in answers] == list(range(30))
    right = [np.equal(each["answer"], each["truth"]) for each in answers]
    assert np.mean(right) == pytest.approx(evaluation["token_accuracy"])
    assert np.mean([each["exact"] for each in answers]) == evaluation["exact_accuracy"]
    assert np.mean([each["steps"] for each in answers]) == evaluation["mean_steps"]
    assert evaluation["token_accuracy"] > 0.5
    assert any(not np.all(each) for each in right), "there is something to tell apart"


def test_exported_model_answers_as_the_averaged_weights_do(
    puzzles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = predicted(capsys, str(puzzles / "run" / "checkpoint_final.pt"), "--count", "30")
    exported = predicted(capsys, str(puzzles / "model.pt"), "--count", "30")
    raw = predicted(capsys, str(puzzles / "run"), "--count", "30", "--weights", "raw")

    assert exported == averaged
    assert raw != averaged


def test_puzzles_stand_beside_the_truth(puzzles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (third,) = predicted(capsys, str(puzzles / "run"), "--first", "2", "--count", "1")

    assert main(["predict", str(puzzles / "run"), "--first", "2", "--count", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[2].startswith("sample 2: ")
    rows = [line.replace("!", " ").split("|") for line in lines[3:7]]
    for at, name in enumerate(("question", "answer", "truth")):
        cells = " ".join(row[at] for row in rows).replace(".", "0").split()
        assert [int(cell) for cell in cells] == third[name]


def test_puzzle_of_ones_own_is_answered(puzzles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = predicted(capsys, str(puzzles / "run"), "--ask", "1... .2.0 ..3. ...4")

    assert found["question"] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4]
    assert found["truth"] is None
    assert found["exact"] is None


def test_wrong_cells_are_marked() -> None:
    question = np.array([1, 0, 0, 4] * 4) + BLANK
    truth = np.array([1, 2, 3, 4] * 4) + BLANK
    said = truth.copy()
    said[2] = 2 + BLANK
    found = Answer(0, question, said, truth, 1)

    plain = _draw_puzzle(found, colours=False)
    coloured = _draw_puzzle(found, colours=True)

    assert plain.count("!") == 1
    assert plain.splitlines()[0] == " 1  .  .  4   |   1  2 !2  4   |   1  2  3  4"
    assert coloured.count("\x1b[31m") == 1
    assert coloured.count("\x1b[32m") == 7


def test_text_cannot_command_the_terminal() -> None:
    text = np.frombuffer("\x1b[2J a\x9b\r\n\tї".encode(), np.uint8).astype(np.int64)

    shown = _draw_text(Answer(0, text, text, text, 1), colours=False)

    assert shown.count("\\x1b[2J a\\x9b\\r\n\tї") == 3
    assert "\x1b" not in shown


def test_text_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": f"the number {name}", "response": name} for name in ("one", "two")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = {
        "--dataset": str(tmp_path / "data.json"), "--eval-dataset": str(tmp_path / "data.json"),
        "--batch-size": "2", "--shards": "1", "--seq-len": "24", "--lr": "1e-2", "--epochs": "60",
        "--dim": "32",
    }  # fmt: skip
    with training(tmp_path / "run", flags=flags) as run:
        finished(run)

    answers = predicted(capsys, str(tmp_path / "run"), "--weights", "raw")
    asked = predicted(capsys, str(tmp_path / "run"), "--weights", "raw", "--ask", "the number two")

    assert [each["question"] for each in answers] == ["the number one", "the number two"]
    assert [each["answer"] for each in answers] == [each["truth"] for each in answers]
    assert [each["truth"] for each in answers] == ["one", "two"]
    assert [each["answer"] for each in asked] == ["two"]
    assert main(["predict", str(tmp_path / "run")]) == 0
    assert "question: the number one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--first", "30"], "has 30 samples, counted from 0"),
        (["--count", "0"], "--count at least 1"),
        (["--ask", "1234"], "a puzzle is 16 cells"),
        (["--ask", "9..............."], "a digit from 1 to 4"),
        (["--dataset", "missing.json"], "there is no such file"),
    ],
)
def test_wrong_questions_are_user_errors(
    puzzles: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["predict", str(puzzles / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_model_that_cannot_be_used_is_a_user_error(
    puzzles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "checkpoint_latest.pt"
    content = bytearray((puzzles / "run" / "checkpoint_final.pt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    assert main(["predict", str(damaged)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["predict", str(puzzles / "model.pt"), "--weights", "raw"]) == 2
    assert "has ema weights only" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_exported_model_answers_as_its_checkpoint_does(
    puzzles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    out = str(tmp_path / "model.safetensors")
    assert main(["export", str(puzzles / "run"), "--out", out, "--weights", weights]) == 0
    assert f"{weights} weights of checkpoint_latest.pt" in capsys.readouterr().out
    chosen = ["--weights", weights, "--count", "30"]
    exported = predicted(capsys, out, *chosen)
    assert exported == predicted(capsys, str(puzzles / "run"), *chosen)
    other = {"ema": "raw", "raw": "ema"}[weights]
    assert main(["predict", out, "--weights", other]) == 2
    assert f"has {weights} weights only" in capsys.readouterr().err


def test_export_is_plain_safetensors_and_says_what_it_is(puzzles: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "model.safetensors")
    assert main(["export", str(puzzles / "run"), "--out", out]) == 0
    with safetensors.safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["trm_dist"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    final = torch.load(puzzles / "run" / "checkpoint_final.pt")
    assert about["config"] == final["config"]
    assert about["batch_count"] == final["batch_count"]
    assert tensors.keys() == final["model_state_dict"].keys()
    for name, average in final["ema_state_dict"]["weights"].items():
        assert torch.equal(tensors[name], average)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_file_that_is_no_export_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert main(["predict", str(tmp_path / "model.safetensors")]) == 2
    assert "this is no export of trm_dist" in capsys.readouterr().err


def test_export_is_written_under_a_name_of_its_own(
    puzzles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(puzzles / "run"), "--out", "model.pt"]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
