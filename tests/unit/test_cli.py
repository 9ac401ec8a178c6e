import gc
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from trm_dist import __version__
from trm_dist.cli import _importing, given_settings, main
from trm_dist.config import Config

FLAGS = [
    "allow_dataset_change",
    "augment",
    "backend",
    "batch_size",
    "cache_dir",
    "cache_gb",
    "checkpoint_dir",
    "checkpoint_interval",
    "clip",
    "compile",
    "cpu_capability",
    "dataset",
    "depth",
    "device",
    "dim",
    "ema",
    "epochs",
    "eval_dataset",
    "eval_interval",
    "expansion",
    "grace_period",
    "h_cycles",
    "halt_explore",
    "hang_timeout",
    "heads",
    "keep_every",
    "keep_last",
    "l_cycles",
    "latest_every_s",
    "leave_on_rebalance",
    "log_every_s",
    "log_format",
    "loss",
    "lr",
    "max_no_progress",
    "max_preemptions",
    "metadata_url",
    "metrics_port",
    "n_sup",
    "net",
    "on_nan",
    "optim",
    "overlong",
    "overwrite",
    "precision",
    "preemption_file",
    "prefix_len",
    "puzzle_emb_lr",
    "puzzle_emb_ndim",
    "puzzle_emb_weight_decay",
    "resume",
    "save",
    "seed",
    "seq_len",
    "shards",
    "snapshot_dir",
    "snapshot_every",
    "snapshot_slots",
    "spot",
    "store_deadline",
    "tensorboard",
    "threads",
    "warmup_steps",
    "weight_decay",
]


def test_flags_change_on_purpose_only() -> None:
    assert sorted(Config().flat()) == FLAGS


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--dim", "3"], {"dim"}),
        (["--dim=3", "--seq_len", "4"], {"dim", "seq_len"}),
        (["--data", "x", "--learning-rate=1"], {"dataset", "lr"}),
        (["--no-overwrite", "--allow-dataset-change"], {"overwrite", "allow_dataset_change"}),
        (["--dataset", "a--dim"], {"dataset"}),
        ([], set()),
    ],
)
def test_given_settings_are_those_with_a_flag(arguments: list[str], names: set[str]) -> None:
    assert given_settings(arguments) == names


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--bach-size", "3"], "--batch-size"),
        (["train", "--dim", "three"], "--dim"),
        (["trian"], "Perhaps you meant train"),
        (["ls", "a", "--jsn"], "--json"),
    ],
)
def test_mistyped_words_get_a_hint(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert hint in told.err + told.out


def test_other_workers_say_nothing_of_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--bach-size", "3"]) == 2
    assert main(["train", "--dim", "0"]) == 2
    told = capsys.readouterr()
    assert told.err + told.out == ""


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


def test_check_of_a_fresh_start_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p", "response": "r" * 99}) for _ in range(5)))
    where = ["--checkpoint-dir", str(tmp_path / "c"), "--seq-len", "50"]
    assert main(["check", "--data", str(path), *where]) == 0
    assert "5 truncated" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_cache_is_listed_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(tmp_path / "cache")
    program = (
        "import sys, numpy as np\n"
        "from trm_dist.data.cache import Cache, cached\n"
        "def make(sink):\n"
        "    sink.write(np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8))\n"
        "    return {'url': 'data.jsonl'}\n"
        "cached(Cache(sys.argv[1], 10**9), {}, make)\n"
    )
    subprocess.run([sys.executable, "-c", program, where], check=True)
    for arguments, removed in (([], [False]), (["--clear"], [True]), ([], [])):
        assert main(["cache", "--cache-dir", where, "--json", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["removed"] for each in found["entries"]] == removed
    assert list(Path(where).iterdir()) == []
    assert main(["cache", "--cache-dir", where]) == 0
    assert capsys.readouterr().out == f"0 in {where}\n"


@pytest.mark.parametrize("error", [None, ImportError("torch")])
def test_garbage_is_collected_again_after_an_import(error: ImportError | None) -> None:
    try:
        with pytest.raises(ImportError) if error else nullcontext(), _importing():
            assert not gc.isenabled()
            if error:
                raise error

        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_help_that_nobody_reads_to_its_end_is_no_error() -> None:
    command = [sys.executable, "-m", "trm_dist", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None, "a pipe"
        process.stdout.close()
        assert process.stderr is not None, "a pipe"
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_command_whose_reader_has_left_comes_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_latest.pt").write_bytes(b"damaged")
    command = [sys.executable, "-m", "trm_dist", "verify", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None, "a pipe"
        process.stdout.close()
        assert process.stderr is not None, "a pipe"
        assert process.stderr.read() == b""
    assert process.returncode == 1, "what it has found still counts"
