"""Points that travel with snapshots, and event files that TensorBoard's own reader reads back."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.curves import points_of
from trm_dist import events
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.store import LocalStore
from trm_dist.checkpoint.tfevents import CURVES, FOLDER, EventFiles, _masked_crc
from trm_dist.observe.curves import Curves
from trm_dist.progress import Progress

RUN = replace(Run.fresh("a launch"), run_id="0123456789abcdef")
BRANCH = "01234567-1"
LOSSES = [random.Random(7).random() for _ in range(400)]


def batch(count: int) -> events.Batch:
    return events.Batch(
        progress=Progress(batch_count=count), loss=LOSSES[count], token_accuracy=0.5,
        exact_accuracy=0.25, mean_steps=2.0, lr=1e-3, num_samples=10, seconds=0.5,
    )  # fmt: skip


def evaluated(count: int) -> events.Evaluated:
    return events.Evaluated(
        progress=Progress(batch_count=count), token_accuracy=0.9, exact_accuracy=count / 100,
        mean_steps=1.5, num_samples=30, seconds=2.0,
    )  # fmt: skip


class Training:
    """Batches whose points go into snapshots, as bytes, and from there into event files."""

    def __init__(self, path: Path, *, run: Run = RUN, snapshot: bytes = b"") -> None:
        self.store = LocalStore(str(path))
        self.files = EventFiles(self.store, run)
        self.curves = Curves(clock=lambda: 1e9)
        self.at = 0
        if snapshot:
            header, _, body = snapshot.partition(b"\0")
            tree = unflatten(header, memoryview(bytearray(body)))
            self.curves.load_state_dict(tree[CURVES])
            self.at = tree["batch_count"]

    def train(self, until: int) -> None:
        for count in range(self.at + 1, until + 1):
            self.curves.add(batch(count))
        self.at = until

    def snapshot(self) -> bytes:
        flat = Flat({"batch_count": self.at, CURVES: self.curves.state_dict()})
        buffer = memoryview(bytearray(flat.num_bytes))
        flat.copy_to(buffer)
        return flat.header + b"\0" + bytes(buffer)

    def commit(self) -> bytes:
        snapshot = self.snapshot()
        header, _, body = snapshot.partition(b"\0")
        self.files.write(header, memoryview(bytearray(body)))
        return snapshot


def assert_told_once(path: Path, batches: int) -> None:
    found = points_of(path / FOLDER / BRANCH / "train")
    assert [each.step for each in found["train/loss"]] == list(range(1, batches + 1))
    assert [each.value for each in found["train/loss"]] == [
        np.float32(loss) for loss in LOSSES[1 : batches + 1]
    ]


def test_checksum_is_crc32c() -> None:
    # RFC 3720, B.4: crc32c of 32 zero bytes is 8A9136AA; here masked.
    masked = ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _masked_crc(bytes(32)) == masked.to_bytes(4, "little")


def test_each_batch_is_one_point_whatever_is_committed_in_between(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for until in (1, 2, 40, 41, 200, 200, 399):
        training.train(until)
        training.commit()
    assert_told_once(tmp_path, 399)
    found = points_of(tmp_path / FOLDER / BRANCH / "train")
    assert found.keys() == {
        f"train/{each}"
        for each in ("loss", "token_accuracy", "exact_accuracy", "mean_steps", "lr", "seconds")
    }
    assert {each.wall_time for each in found["train/lr"]} == {1e9}


def test_restart_from_an_older_snapshot_writes_no_point_twice(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train(20)
    old = first.commit()
    first.train(50)
    first.commit()
    second = Training(tmp_path, snapshot=old)
    for until in (30, 45, 70, 90):
        second.train(until)
        second.commit()
    assert_told_once(tmp_path, 90)


def test_snapshot_that_was_never_committed_loses_no_point(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train(20)
    first.commit()
    first.train(33)  # told, in memory, and then the worker is killed
    second = Training(tmp_path, snapshot=first.snapshot())
    second.train(40)
    second.commit()
    assert_told_once(tmp_path, 40)


class StoreThatDiesOnce(LocalStore):
    """Fails when a record is written."""

    is_dying = True

    def put(self, name, pieces, guard=lambda: None):
        if name.endswith("written.json") and self.is_dying:
            self.is_dying = False
            raise OSError("gone")
        super().put(name, pieces, guard)


@pytest.mark.parametrize("later", [0, 10])
def test_death_between_file_and_record_costs_nothing(tmp_path: Path, later: int) -> None:
    first = Training(tmp_path)
    first.files = EventFiles(StoreThatDiesOnce(str(tmp_path)), RUN)
    first.train(20)
    with pytest.raises(OSError, match="gone"):
        first.commit()
    second = Training(tmp_path, snapshot=first.snapshot())
    second.train(20 + later)
    second.commit()
    second.train(50)
    second.commit()
    assert_told_once(tmp_path, 50)


def test_store_that_is_away_loses_the_oldest_points_only_when_it_is_away_for_long(
    tmp_path: Path,
) -> None:
    training = Training(tmp_path)
    training.curves = Curves(num_batches=100)
    training.train(100)
    training.commit()
    training.train(200)  # nothing is committed in between
    training.commit()
    assert_told_once(tmp_path, 200)
    training.train(305)
    training.commit()
    found = points_of(tmp_path / FOLDER / BRANCH / "train")["train/loss"]
    assert [each.step for each in found] == [*range(1, 201), *range(206, 306)]
    resumed = Curves(num_batches=100)
    resumed.load_state_dict(training.curves.state_dict())
    training.curves = resumed  # the oldest still make room, once all places are taken
    training.train(330)
    training.commit()
    found = points_of(tmp_path / FOLDER / BRANCH / "train")["train/loss"]
    assert [each.step for each in found] == [*range(1, 201), *range(206, 331)]


def test_evaluations_have_points_of_their_own(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for until in (10, 20, 30):
        training.train(until)
        training.commit()  # before the evaluation of this boundary is known
        training.curves.add(evaluated(until))
        training.curves.add(evaluated(until))
    training.commit()
    assert training.curves.has_evaluation(30)
    found = points_of(tmp_path / FOLDER / BRANCH / "evaluation")["evaluation/exact_accuracy"]
    assert [(each.step, each.value) for each in found] == [
        (until, np.float32(until / 100)) for until in (10, 20, 30)
    ]
    assert_told_once(tmp_path, 30)


def test_each_branch_has_files_of_its_own(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train(20)
    first.commit()
    branch = Training(tmp_path, run=replace(RUN, branch=2))
    branch.at = 10
    branch.train(15)
    branch.commit()
    assert_told_once(tmp_path, 20)
    found = points_of(tmp_path / FOLDER / "01234567-2" / "train")["train/loss"]
    assert [each.step for each in found] == [11, 12, 13, 14, 15]


def test_values_that_are_too_large_become_infinite(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.curves.add(replace(batch(1), loss=1e300))
    training.commit()
    (point,) = points_of(tmp_path / FOLDER / BRANCH / "train")["train/loss"]
    assert point.value == float("inf")
