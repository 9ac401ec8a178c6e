"""Where a run goes on: branches, damage, clean-ups by hand, other settings, far positions."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.elastic.harness import (
    Undisturbed,
    forget_snapshots,
    kill,
    kill_all,
    kill_everything,
    training,
)
from tests.elastic.test_kill import assert_same_bits

BRANCH = {"--lr": "1e-3"}


def test_branch_from_an_older_file_never_rewinds_and_never_takes_the_abandoned_future(
    directory: Path,
) -> None:
    with training(directory) as first:
        assert first.end() == 0, first.messages()
    elsewhere = directory.parent / "copy" / "checkpoints"
    shutil.copytree(directory, elsewhere)
    back = {"--resume": "checkpoint_epoch_3_batch_1.pt"}  # batch 21 of the run
    with training(elsewhere, flags=branch_flags(elsewhere, back)) as untouched:
        assert untouched.end() == 0, untouched.messages()

    reached, runs = 21, []
    for _ in range(3):
        with training(directory, flags=branch_flags(directory, back)) as run:
            run.wait_for_batches(12)
            assert run.events("batch")[0]["batch_count"] > reached, "it rewound"
            assert run.events("started")[0]["batch_count"] < 60, "it took the abandoned future"
            reached = run.events("committed")[-1]["batch_count"]
            kill_all(run)
            runs.append(run)
    with training(directory, flags=branch_flags(directory, back)) as last:
        assert last.end() == 0, last.messages()
    assert last.events("batch")[0]["batch_count"] > reached
    assert_same_bits([*runs, last], Undisturbed(untouched.losses(), untouched.digest()))
    assert last.digest() != first.digest()


def branch_flags(directory: Path, back: dict[str, str]) -> dict[str, str]:
    return BRANCH | {"--resume": str(directory / back["--resume"])}


def test_restarted_workers_of_an_overwriting_launch_do_not_begin_again(directory: Path) -> None:
    with training(directory, flags={"--epochs": "2"}) as first:
        assert first.end() == 0
    flags = {"--resume": "never", "--overwrite": ""}
    with training(directory, workers=2, max_restarts=5, flags=flags) as run:
        run.wait_for_batches(15)
        kill(run.worker(0))
        run.wait_for_start(2)
        assert run.events("started")[0]["batch_count"] == 0
        assert run.events("started")[1]["batch_count"] >= 14
        assert run.end() == 0, run.messages()


def test_clean_up_by_the_guides_one_liner_in_mid_run_hurts_nothing(
    directory: Path, undisturbed: Undisturbed
) -> None:
    flags = {"--checkpoint-interval": "1"}
    clean = f"cd {directory} && ls -t | tail -n +3 | xargs rm -f"
    with training(directory, flags=flags) as first:
        for _ in range(8):
            first.wait_for_batches(4)
            subprocess.run(clean, shell=True, check=True)
            # Latest itself may be the third for a moment: its new link comes after the new file.
            assert any(each.suffix == ".pt" for each in directory.iterdir())
        kill_all(first)
    subprocess.run(clean, shell=True, check=True)
    with training(directory, flags=flags) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)


def test_damaged_latest_is_named_and_an_older_file_is_taken(
    directory: Path, undisturbed: Undisturbed
) -> None:
    with training(directory) as first:
        first.wait_for_batches(30)
        kill_everything(first)
    forget_snapshots()
    latest = directory / "checkpoint_latest.pt"
    whole = latest.read_bytes()
    latest.unlink()  # a link of the epoch file's bytes: write a file of its own
    latest.write_bytes(whole[:1000] + b"?" + whole[1001:])
    with training(directory) as second:
        assert second.end() == 0, second.messages()
        assert_same_bits([first, second], undisturbed)
    assert "checkpoint_latest.pt is damaged" in second.messages()


@pytest.mark.parametrize("batch_idx", [0, 1_000_000])
def test_resume_far_into_an_epoch_reads_what_resume_at_its_start_reads(
    tmp_path: Path, batch_idx: int
) -> None:
    script = tmp_path / "far.py"
    script.write_text(textwrap.dedent(FAR_RESUME))
    done = subprocess.run(
        [sys.executable, script, str(batch_idx)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["rows", "8", "batches", "2"], done.stderr


FAR_RESUME = """
    # A data set of 10^10 samples that takes no memory; it counts the rows it is asked for.
    import os, sys
    import numpy as np
    import torch
    from trm_dist.config import Config, derived_sizes, resolve
    from trm_dist.data.dataset import Dataset
    from trm_dist.checkpoint.resume import Start
    from trm_dist.checkpoint.runs import Run
    from trm_dist.elastic.pulse import Pulse
    from trm_dist.elastic.world import World, form_group
    from trm_dist.plan import Plan, shape_of
    from trm_dist.progress import Progress
    from trm_dist.train import Trainer

    asked = []

    class Counting(Dataset):
        def rows(self, samples):
            asked.append(len(samples))
            return super().rows(samples)

    one = np.full((1, 16), 2, dtype=np.uint8)
    data = Counting(
        url="", inputs=np.broadcast_to(one, (10**10, 16)),
        labels=np.broadcast_to(one, (10**10, 16)),
        num_tokens=6, codec="sudoku4", sha256="",
    )
    sizes = dict(dim=16, depth=1, h_cycles=1, l_cycles=1, n_sup=1, seq_len=16)
    config = Config().with_values(sizes)
    settings = resolve(config, (), None)
    settings = settings.with_derived(**derived_sizes(config, seq_len=16))
    start = Start(Run.fresh(""), "", None)
    plan = Plan(settings, start, data, None, shape_of(settings.config, 6, 0))
    pulse = Pulse.of_worker({}, 0, 0.0)
    group = form_group(World(), os.environ, 60)
    on = torch.device("cpu")
    trainer = Trainer(plan, group, lambda event: None, pulse, lambda spent: None, on)
    at = int(sys.argv[1])
    trainer._progress = Progress(batch_idx=at, batch_count=at)
    trainer._train_batch()
    trainer._train_batch()
    print("rows", sum(asked), "batches", trainer._progress.batch_count - at, flush=True)
    os._exit(0)
"""
