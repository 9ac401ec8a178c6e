"""The plan: what a launch is, and what it says of the space that it needs."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import RUN, MemoryStore, make_state, to_bytes
from trm_dist.checkpoint.runs import claim, new_writer
from trm_dist.checkpoint.store import LocalStore
from trm_dist.config import Config
from trm_dist.data.dataset import open_dataset
from trm_dist.errors import DataError
from trm_dist.plan import (
    check_puzzles,
    check_space,
    estimate,
    from_message,
    make_plan,
    to_message,
)

DATA = "sudoku4:train?count=8"


@pytest.fixture
def used(tmp_path: Path) -> Config:
    """A directory with two checkpoints of a run on DATA."""
    config = Config().with_values({"dataset": DATA, "checkpoint_dir": str(tmp_path)})
    identity = open_dataset(DATA, seq_len=0, overlong="truncate").identity()
    for count in (1, 2):
        state = make_state(count, dataset=identity, config={"dataset": DATA})
        store = LocalStore(str(tmp_path))
        store.put(f"checkpoint_epoch_1_batch_{count}.pt", [to_bytes(state)[0]])
    return config


def resuming(config: Config, batch: int) -> Config:
    name = f"checkpoint_epoch_1_batch_{batch}.pt"
    return config.with_values({"resume": f"{config.checkpoint.checkpoint_dir}/{name}"})


def test_launch_with_the_same_id_that_asks_for_another_start_is_another_launch(
    used: Config,
) -> None:
    store = LocalStore(used.checkpoint.checkpoint_dir)
    first = make_plan(resuming(used, 1), (), "job")
    run = claim(store, first.start.run, new_writer())

    assert make_plan(resuming(used, 1), (), "job").start.run == run
    assert make_plan(resuming(used, 2), (), "job").start.run.branch == first.start.run.branch + 1


def test_checkpoints_that_will_not_fit_are_warned_of(
    used: Config, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(MemoryStore):
        def free_bytes(self) -> int | None:
            return estimate(plan)["kept_bytes"] - 1

    plan = make_plan(used, (), "job")
    plan = replace(plan, start=replace(plan.start, run=RUN))
    with caplog.at_level(logging.WARNING):
        check_space(plan, Full())
    assert "--keep-last" in caplog.text


def test_data_with_more_puzzles_than_the_model_has_vectors_are_refused() -> None:
    dataset = replace(open_dataset(DATA, seq_len=0), num_puzzles=3)
    without, having = (Config().with_values({"puzzle_emb_ndim": each}) for each in (0, 4))
    check_puzzles(without, dataset, num_puzzles=2)
    check_puzzles(having, dataset, num_puzzles=3)
    with pytest.raises(DataError, match="3 puzzles, and the model vectors for 2"):
        check_puzzles(having, dataset, num_puzzles=2)


def test_what_a_worker_computes_on_is_its_own_affair(tmp_path: Path) -> None:
    ours = Config().with_values({"dataset": DATA, "checkpoint_dir": str(tmp_path)})
    plan = make_plan(ours, (), "job")
    theirs = ours.with_values({"device": "cpu"})
    assert from_message(to_message(plan), None, theirs).config.train == theirs.train
