"""Restart budgets and signs of life, without any process."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from trm_dist.checkpoint.runs import RECORD, Run, claim, excuse, new_writer, read_run
from trm_dist.checkpoint.store import open_store
from trm_dist.elastic.pulse import LEAST_LIMIT_S, START_LIMIT_S, Pulse, new_pulse
from trm_dist.elastic.restarts import Budget, pause_s


def test_failures_in_the_same_place_add_up_and_a_new_batch_forgets_them() -> None:
    budget = Budget(limit=3)
    for batch_count, failures in ((0, 1), (0, 2), (4, 1), (4, 2), (5, 1), (5, 2), (3, 3)):
        assert not budget.is_spent
        budget.fail(batch_count)
        assert budget.failures == failures
    assert budget.is_spent


def test_budget_of_none_is_never_spent() -> None:
    budget = Budget(limit=0)
    for _ in range(100):
        budget.fail(0)
    assert not budget.is_spent


def test_pauses_grow_from_none_to_a_minute() -> None:
    pauses = [pause_s(failures) for failures in range(12)]
    assert pauses[:5] == [0, 0, 1, 2, 4]
    assert all(one <= other for one, other in itertools.pairwise(pauses))
    assert pauses[-1] == 60


def start(directory: Path, batch_count: int, run: Run) -> Run:
    store = open_store(str(directory))
    return claim(store, replace(run, starts_at=batch_count), new_writer())


def test_record_counts_failures_and_preemptions_apart(tmp_path: Path) -> None:
    store, run = open_store(str(tmp_path)), Run.fresh("launch")

    def counts(batch_count: int) -> tuple[int, int]:
        claimed = start(tmp_path, batch_count, run)
        return claimed.failures, claimed.preemptions

    assert counts(0) == (0, 0)
    assert counts(0) == (1, 0)
    found = read_run(store)
    assert found
    excuse(store, found)
    assert counts(0) == (1, 1)
    assert counts(0) == (2, 1)
    assert counts(7) == (0, 0)
    assert counts(7) == (1, 0)


def test_another_branch_counts_anew(tmp_path: Path) -> None:
    run = Run.fresh("launch")
    start(tmp_path, 5, run)
    assert start(tmp_path, 5, run).failures == 1
    assert start(tmp_path, 5, run.next_branch("digest", "url", "launch")).failures == 0


def test_only_the_writer_itself_is_excused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    older = start(tmp_path, 0, Run.fresh("launch"))
    newer = start(tmp_path, 0, older)
    excuse(store, older)
    assert read_run(store) == newer


def test_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    store, run = open_store(str(tmp_path)), start(tmp_path, 0, Run.fresh("launch"))
    text = bytes(store.read(RECORD)).decode()
    for name in ("starts_at", "failures", "preemptions"):
        text = text.replace(f' "{name}": 0,\n', "")
    text = text.replace(',\n "was_preempted": false', "")
    assert "starts_at" not in text
    assert "was_preempted" not in text
    store.put(RECORD, [text.encode()])
    assert read_run(store) == run


@pytest.mark.parametrize(("given", "limit"), [(0.0, LEAST_LIMIT_S), (7.0, 7.0)])
def test_limit_is_that_of_a_start_until_a_batch_is_complete(given: float, limit: float) -> None:
    pulse = Pulse.of_worker({}, 0, given)
    pulse.beat()
    assert pulse.limit_s() == START_LIMIT_S
    pulse.beat(120)  # resumed there
    assert pulse.limit_s() == START_LIMIT_S
    pulse.beat(121)
    assert pulse.limit_s() == limit


def test_signs_of_all_workers_are_in_one_place() -> None:
    descriptor, pulse = new_pulse(3)
    variables = {"TRM_DIST_PULSE": str(descriptor)}
    for slot in range(3):
        Pulse.of_worker(variables, slot, 5.0).beat(10 + slot)
    signs = pulse.signs()
    assert [each.batch_count for each in signs] == [10, 11, 12]
    assert all(each.at_s > 0 and each.limit_s == START_LIMIT_S for each in signs)
