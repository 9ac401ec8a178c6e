"""The record of a run: written, read, lost and rebuilt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import RUN, MemoryStore, make_summary
from trm_dist.checkpoint.runs import RECORD, Run, read_run, write_run
from trm_dist.checkpoint.store import LocalStore


def summaries(*places: tuple[str, float, int]) -> list[dict[str, Any]]:
    """Return what seals say: of each the run, when the run began, and the branch."""
    return [
        make_summary(1, replace(RUN, run_id=run_id, created_at=created_at, branch=branch))
        for run_id, created_at, branch in places
    ]


def test_fresh_run_is_branch_1_from_nothing() -> None:
    run = Run.fresh("launch-7")

    assert (run.branch, run.origin, run.launch_id) == (1, "", "launch-7")


def test_fresh_runs_have_ids_of_their_own() -> None:
    assert len({Run.fresh("same").run_id for _ in range(100)}) == 100


def test_next_branch_remembers_origin_and_launch() -> None:
    run = RUN.next_branch("digest", "where", "launch-7")

    assert run == replace(RUN, branch=2, origin="digest", origin_url="where", launch_id="launch-7")


def test_summary_is_what_rebuilds_the_record() -> None:
    assert Run(**RUN.summary()) == RUN


# -- the record ------------------------------------------------------------------------------------


def test_record_is_read_back() -> None:
    store = MemoryStore()
    run = replace(RUN, branch=3, origin="digest", created_at=1764043200.123456)

    write_run(store, run)

    assert read_run(store) == run


def test_record_lies_hidden() -> None:
    store = MemoryStore()

    write_run(store, RUN)

    assert list(store.files) == [".trm_dist/run.json"]


def test_record_that_says_so_already_is_left_alone() -> None:
    store = MemoryStore()
    write_run(store, RUN)
    store.calls.clear()

    write_run(store, RUN)

    assert store.calls == []


def test_record_is_renewed_for_another_branch() -> None:
    store = MemoryStore()
    write_run(store, RUN)

    write_run(store, RUN.next_branch("digest", "where", "launch-2"))

    assert read_run(store) == RUN.next_branch("digest", "where", "launch-2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b'{"run_id": "run-1"}',
        json.dumps({**RUN.summary(), "unknown": 1}).encode(),
    ],
)
def test_record_that_cannot_be_read_is_none(content: bytes) -> None:
    store = MemoryStore()
    store.put(RECORD, content)

    assert read_run(store) is None


def test_record_of_an_empty_store_is_none() -> None:
    assert read_run(MemoryStore()) is None


def test_record_below_a_regular_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file, not a directory")

    assert read_run(LocalStore(str(tmp_path / "run"))) is None


# -- rebuilding ------------------------------------------------------------------------------------


def test_nothing_is_rebuilt_from_nothing() -> None:
    assert Run.rebuilt([]) is None


def test_record_is_rebuilt_from_a_checkpoint() -> None:
    run = replace(RUN, branch=3, origin="digest")

    assert Run.rebuilt([make_summary(5, run)]) == run


def test_record_is_rebuilt_from_a_checkpoint_that_does_not_name_its_launch() -> None:
    summary = make_summary(5)
    del summary["launch_id"]

    assert Run.rebuilt([summary]) == replace(RUN, launch_id="")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("a", 1.0, 1), ("a", 1.0, 2)], ("a", 2)),
        ([("a", 1.0, 2), ("a", 1.0, 1)], ("a", 2)),
        ([("a", 1.0, 9), ("a", 1.0, 10)], ("a", 10)),
        ([("a", 1.0, 9), ("b", 2.0, 1)], ("b", 1)),
        ([("b", 2.0, 1), ("a", 1.0, 9)], ("b", 1)),
        ([("b", 2.0, 1), ("a", 1.0, 9), ("b", 2.0, 2)], ("b", 2)),
    ],
)
def test_newest_branch_of_the_newest_run_is_rebuilt(
    places: list[tuple[str, float, int]], expected: tuple[str, int]
) -> None:
    run = Run.rebuilt(summaries(*places))

    assert run is not None
    assert (run.run_id, run.branch) == expected
