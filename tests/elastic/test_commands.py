"""The guide's two scripts under torchrun; test_guides.py runs them as the guide does."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.elastic.harness import Training, started

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
QUICK = ["--dim", "16", "--depth", "1", "--seq-len", "32", "--batch-size", "4", "--n-sup", "1"]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records as the OpenAssistant file has them."""
    data = [
        {"context": f"Питання {n}", "query": "Continue", "completion": f"answer {n % 3}"}
        for n in range(24)
    ]
    path = tmp_path / "openassistant_train.json"
    path.write_text(json.dumps({"metadata": {"split": "train"}, "data": data}))
    return path


def finish(directory: Path, command: list[str]) -> Training:
    with started(directory, [sys.executable, *command]) as run:
        assert run.end() == 0, run.messages()
        return run


@pytest.mark.soak  # the checkpoint guide runs it as well
def test_guides_main_script_trains_and_resumes(tmp_path: Path, records: Path) -> None:
    directory = tmp_path / "checkpoints"
    script = [*TORCHRUN, str(ROOT / "launch/train_model.py"), "--dataset", str(records)]
    where = ["--checkpoint-dir", str(directory)]
    finish(directory, [*script, *where, "--checkpoint-interval", "3", "--epochs", "1", *QUICK])
    assert (directory / "checkpoint_epoch_1_batch_3.pt").is_file()
    assert (directory / "checkpoint_final.pt").is_file()

    latest = ["--resume", str(directory / "checkpoint_latest.pt")]
    resumed = finish(directory, [*script, *latest, *where, "--epochs", "2"])
    assert "resumed from" in resumed.messages()
    checkpoint = torch.load(directory / "checkpoint_latest.pt")
    assert checkpoint["batch_count"] == 12
    assert not any(name.startswith("module.") for name in checkpoint["model_state_dict"])

    named = ["--resume", str(directory / "checkpoint_epoch_1_batch_3.pt")]
    finish(directory, [*script, *named, *where])
    assert torch.load(directory / "checkpoint_latest.pt")["run"]["branch"] == 2


def test_guides_code_script_saves_the_final_model(tmp_path: Path, records: Path) -> None:
    directory, model = tmp_path / "checkpoints", tmp_path / "trm_optimized.pt"
    script = [*TORCHRUN, str(ROOT / "launch/train_code_model.py"), "--data", str(records)]
    spelled = ["--learning_rate=1e-3", "--seq_len=32", "--save", str(model), "--epochs=1"]
    sizes = ["--dim=16", "--depth=1", "--batch_size=4", "--n-sup=1"]
    finish(directory, [*script, *spelled, *sizes, "--checkpoint-dir", str(directory)])
    saved = torch.load(model)
    final = torch.load(directory / "checkpoint_final.pt")
    average = final["ema_state_dict"]["weights"]["token_head.weight"]
    assert torch.equal(saved["model_state_dict"]["token_head.weight"], average)
    assert saved["config"]["lr"] == 1e-3
