"""Vectors of puzzles, learned by SignSGD: one digest at every world size and through kills."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.elastic.harness import SMALL, Undisturbed, kill, training
from tests.elastic.test_kill import assert_same_bits

FLAGS = {name: value for name, value in SMALL.items() if "dataset" not in name} | {
    "--prefix-len": "2",
    "--puzzle-emb-ndim": "20",
    "--puzzle-emb-lr": "0.02",
    "--epochs": "25",
}


def write_folder(path: Path) -> str:
    """25 rows of ten puzzles, many rows of the first; puzzles 3 and 7 have none."""
    chance = np.random.default_rng(0)
    inputs = chance.integers(1, 5, (25, 6), dtype=np.uint8)
    lengths = [9, 2, 3, 1, 1, 4, 2, 3]
    path.mkdir()
    sizes = {"vocab_size": 6, "seq_len": 6, "ignore_label_id": 0, "num_puzzle_identifiers": 10}
    (path / "dataset.json").write_text(json.dumps(sizes))
    np.save(path / "all__inputs.npy", inputs)
    np.save(path / "all__labels.npy", (inputs + 1).astype(np.uint8))
    np.save(path / "all__puzzle_identifiers.npy", np.array([5, 0, 9, 1, 2, 4, 6, 8], np.int32))
    np.save(path / "all__puzzle_indices.npy", np.cumsum([0, *lengths]).astype(np.int32))
    return str(path)


@pytest.mark.timeout(600)
def test_vectors_of_puzzles_have_one_digest_whoever_trains_them(tmp_path: Path) -> None:
    flags = FLAGS | {"--dataset": write_folder(tmp_path / "maze")}
    flags |= {"--eval-dataset": flags["--dataset"]}
    with training(tmp_path / "alone", base={}, flags=flags) as run:
        assert run.end() == 0, run.messages()
        expected = Undisturbed(run.losses(), run.digest())
    state = torch.load(tmp_path / "alone" / "checkpoint_final.pt")
    vectors = state["model_state_dict"]["puzzle_embedding"]
    assert vectors.shape == (10, 20)
    assert [number for number, each in enumerate(vectors) if not each.any()] == [3, 7]
    for workers in (2, 3):
        with training(tmp_path / str(workers), base={}, flags=flags, launch=workers) as run:
            run.wait_for_batches(7)
            kill(run.named("trm worker 1"))
            run.wait_for_start(2)
            assert run.end() == 0, run.messages()
            assert_same_bits([run], expected)
