"""The ledger as it is written, and the sums that are made of it."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lives import RUN, Life
from trm_dist import events
from trm_dist.observe.goodput import Account, account, parse
from trm_dist.observe.ledger import FINISHED, SPANS, Spent
from trm_dist.progress import Progress


def one_life() -> Life:
    life = Life(102.0, launched_at=100.0)
    life.spend(Spent.STARTUP, 1)
    life.spend(Spent.RENDEZVOUS, 2)
    life.spend(Spent.RESTORE, 3)
    life.train_from(0)
    life.spend(Spent.DATA_WAIT, 4)
    life.batch(5)
    life.spend(Spent.SAVE_STALL, 6)
    life.spend(Spent.EVALUATION, 7)
    return life


def seconds(found: Account) -> dict[str, float]:
    return {name: each for name, each in found.seconds.items() if each}


def test_every_second_is_told_by_what_it_was_spent_on() -> None:
    found = account([one_life().start()])

    assert found.total_s == 2 + 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert seconds(found) == {
        "startup": 3, "rendezvous": 2, "restore": 3, "data_wait": 4, "productive": 5,
        "save_stall": 6, "evaluation": 7,
    }  # fmt: skip
    assert found.goodput == 5 / 30


def test_a_start_can_tell_its_seconds_while_it_lives() -> None:
    life = one_life()
    life.ledger.move(1, Spent.STARTUP, Spent.RESTORE)

    found = {name: each for name, each in life.ledger.totals().items() if each}

    assert found == {
        "rendezvous": 2, "restore": 4, "data_wait": 4, "productive": 5, "save_stall": 6,
        "evaluation": 7,
    }  # fmt: skip


def test_time_is_moved_to_what_it_was_really_spent_on() -> None:
    life = Life(0.0)
    life.spend(Spent.STARTUP, 5)
    life.ledger.move(2, Spent.STARTUP, Spent.RESTORE)
    life.train_from(0)

    assert seconds(account([life.start()])) == {"startup": 3, "restore": 2}


def test_batch_in_progress_at_a_kill_is_lost_work_and_the_gap_is_down() -> None:
    first, second = Life(0.0), Life(20.0)
    first.train_from(0)
    first.batch(8)
    first.spend(Spent.PRODUCTIVE, 3)
    second.train_from(1)
    second.batch(8)

    found = account([first.start(), second.start()])

    assert seconds(found) == {"productive": 16, "lost_work": 3, "down": 9}
    assert found.total_s == 28


def test_batch_in_progress_of_a_run_that_goes_on_is_productive() -> None:
    life = Life(0.0)
    life.train_from(0)
    life.batch(8)
    life.spend(Spent.PRODUCTIVE, 3)

    assert seconds(account([life.start()])) == {"productive": 11}


def test_batch_in_progress_at_a_stop_is_lost_work() -> None:
    life = Life(0.0)
    life.train_from(0)
    life.batch(8)
    life.spend(Spent.PRODUCTIVE, 3)
    life.ledger.stop("SIGTERM")
    life.spend(Spent.PRODUCTIVE, 2)  # the training thread goes on while another one saves
    life.ledger.end()

    found = life.start()

    assert found.reason == "SIGTERM"
    assert seconds(account([found])) == {"productive": 8, "lost_work": 3, "save_stall": 2}


def test_batches_that_are_trained_again_are_lost_work() -> None:
    first, second, third = Life(0.0), Life(100.0), Life(200.0)
    first.train_from(0)
    for _ in range(10):
        first.batch(10)
    second.train_from(6)
    for _ in range(10):
        second.batch(10)
    third.train_from(9)

    found = account([each.start() for each in (first, second, third)])

    assert seconds(found) == {"productive": 60 + 30, "lost_work": 40 + 70}


def test_start_that_goes_further_back_than_the_one_before_takes_the_work_of_both() -> None:
    first, second, third = Life(0.0), Life(100.0), Life(200.0)
    first.train_from(0)
    for _ in range(10):
        first.batch(10)
    second.train_from(10)
    for _ in range(10):
        second.batch(10)
    third.train_from(4)

    found = account([each.start() for each in (first, second, third)])

    assert seconds(found) == {"productive": 40, "lost_work": 60 + 100}


def test_start_that_has_not_come_to_train_takes_no_work_away() -> None:
    first, second = Life(0.0), Life(8.0)
    first.train_from(0)
    first.batch(8)
    second.spend(Spent.STARTUP, 2)

    assert seconds(account([first.start(), second.start()])) == {"productive": 8, "startup": 2}


def test_time_of_two_writers_at_once_counts_once() -> None:
    orphan, successor = Life(0.0), Life(5.0)
    orphan.train_from(0)
    for _ in range(10):
        orphan.batch(1)
    successor.train_from(10)
    successor.batch(10)

    found = account([orphan.start(), successor.start()])

    assert found.total_s == 15
    assert math.fsum(found.seconds.values()) == 15


def test_launcher_counts_for_the_first_start_only() -> None:
    first, second = Life(2.0, launched_at=0.0), Life(20.0, launched_at=0.0)
    first.train_from(0)
    first.batch(8)
    second.train_from(1)
    second.batch(1)

    assert seconds(account([first.start(), second.start()])) == {
        "startup": 2, "productive": 9, "down": 10,
    }  # fmt: skip


def test_wait_for_a_new_launcher_is_down_and_its_own_time_is_startup() -> None:
    first, second = Life(0.0), Life(20.0, launched_at=17.0)
    first.train_from(0)
    first.batch(8)
    second.train_from(1)

    assert seconds(account([first.start(), second.start()])) == {
        "productive": 8, "down": 9, "startup": 3,
    }  # fmt: skip


def test_segments_follow_each_other_without_gap_or_overlap() -> None:
    lives = [one_life(), Life(200.0), Life(210.0)]
    lives[1].train_from(1)
    lives[1].batch(20)
    lives[2].train_from(1)
    lives[2].batch(1)

    found = account([each.start() for each in lives])

    ends = [each.until for each in found.segments]
    assert [each.since for each in found.segments[1:]] == ends[:-1]
    assert found.total_s == 211 - 100 == math.fsum(found.seconds.values())


def test_reason_of_a_stop_outlives_a_batch_that_is_completed_after_it() -> None:
    life = Life(0.0)
    life.train_from(0)
    life.ledger.spend(Spent.PRODUCTIVE)
    life.ledger.stop("SIGTERM")
    life.batch(20)  # long enough to begin another line
    life.ledger.end()

    assert life.start().reason == "SIGTERM"


def test_time_after_the_run_has_finished_does_not_count() -> None:
    first, more = Life(0.0), Life(1000.0)
    first.train_from(0)
    first.batch(8)
    first.finish()
    more.train_from(1)  # as more epochs were asked for
    more.batch(8)

    found = account([first.start(), more.start()])

    assert seconds(found) == {"productive": 16}
    assert found.total_s == 16
    assert [each.since for each in found.segments] == [0, 8]


@pytest.mark.parametrize("missing", ["seconds", "last"])
def test_line_that_lacks_something_is_left_out(missing: str) -> None:
    lines = [json.loads(line) for line in one_life().read().splitlines()]
    lines[-1].pop(missing)

    found = parse(b"".join(json.dumps(each).encode() + b"\n" for each in lines))

    assert found is not None
    assert len(found.spans) == len(one_life().start().spans) - 1


def test_no_start_has_no_time() -> None:
    found = account([])

    assert (found.total_s, found.goodput) == (0, 0)


def test_lines_hold_means_over_samples_and_what_was_counted() -> None:
    life = Life(0.0)
    life.train_from(3)
    life.batch(0.25, loss=1.0, num_samples=1)
    life.batch(0.25, loss=4.0, num_samples=2)
    at = Progress(batch_count=5)
    life.ledger(events.Committed(progress=at, names=["a"], num_bytes=7, seconds=1, waited_s=0))
    life.ledger(events.CommitFailed(progress=at, error="", num_failures=1, retry_in_s=1))
    life.ledger(
        events.Evaluated(
            progress=at, token_accuracy=0.9, exact_accuracy=0.8, mean_steps=1, num_samples=1,
            seconds=1,
        )
    )  # fmt: skip

    span = life.start().spans[-1]

    assert (span.first, span.last, span.loss) == (3, 5, 3.0)
    assert (span.commits, span.commit_bytes, span.committed, span.commit_failures) == (1, 7, 5, 1)
    assert span.evaluation == {"batch_count": 5, "token_accuracy": 0.9, "exact_accuracy": 0.8}


def test_lines_get_longer_as_the_run_gets_older() -> None:
    life = Life(RUN["created_at"])  # type: ignore[arg-type]
    life.train_from(0)
    for _ in range(10_000):
        life.batch(1)

    spans = life.start().spans

    assert sum(each.last - each.first for each in spans) == 10_000
    assert spans[1].until - spans[1].since < 2
    assert len(spans) < 2 * SPANS * math.log(10_000 / SPANS)


def test_finished_start_says_so_with_its_digest() -> None:
    life = one_life()
    life.finish("d")
    life.spend(Spent.PRODUCTIVE, 5)

    found = life.start()

    assert (found.reason, found.digest) == (FINISHED, "d")
    assert account([found]).total_s == 30


@pytest.mark.parametrize("missing", range(1, 60, 7))
def test_line_that_was_being_written_is_left_out(missing: int) -> None:
    data = one_life().read()

    found = parse(data[:-missing])

    assert found is not None
    assert found.training["batch_count"] == 0


@pytest.mark.parametrize("data", [b"", b"\n", b"nonsense\n", b"[1]\n", b'{"is": "span"}\n'])
def test_what_is_no_ledger_is_none(data: bytes) -> None:
    assert parse(data) is None


def test_ledger_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    lines = [json.loads(line) for line in one_life().read().splitlines()]
    lines = [each | {"new": 1} for each in lines] + [{"is": "new"}]

    found = parse(b"".join(json.dumps(each).encode() + b"\n" for each in lines))

    assert found is not None
    assert account([found]).total_s == 30


def test_shorter_line_leaves_nothing_of_the_longer_one_before() -> None:
    life = Life(0.0)
    life.train_from(0)
    life.batch(0.1234567891234, loss=1 / 3)
    life.batch(0.5, loss=1.0)

    assert all(_is_json(line) for line in life.read().splitlines())


def _is_json(line: bytes) -> Any:
    return json.loads(line)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    for each in set(os.listdir("/proc/self/fd")) - before:
        if os.path.islink(f"/proc/self/fd/{each}"):
            os.close(int(each))
