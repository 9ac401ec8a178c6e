"""The record of a run: written, read, lost and rebuilt."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import RUN, MemoryStore, make_summary
from trm_dist.checkpoint.runs import RECORD, Run, claim, guard_of, new_writer, read_run
from trm_dist.checkpoint.store import LocalStore
from trm_dist.errors import FencedError

ROOT = Path(__file__).parents[2]


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

    claimed = claim(store, run, new_writer())

    assert read_run(store) == claimed
    assert replace(claimed, generation=0, writer="") == run


def test_record_lies_hidden() -> None:
    store = MemoryStore()

    claim(store, RUN, new_writer())

    assert list(store.files) == [".trm_dist/run.json"]


def test_record_is_renewed_for_another_branch() -> None:
    store = MemoryStore()
    claim(store, RUN, new_writer())

    claimed = claim(store, RUN.next_branch("digest", "where", "launch-2"), new_writer())

    assert read_run(store) == claimed
    assert (claimed.branch, claimed.generation) == (2, 2)


# -- the one writer --------------------------------------------------------------------------------


def test_every_claim_takes_the_next_generation() -> None:
    store = MemoryStore()

    assert [claim(store, RUN, new_writer()).generation for _ in range(3)] == [1, 2, 3]


def test_claim_of_a_rebuilt_run_goes_on_with_the_generations_of_the_record() -> None:
    store = MemoryStore()
    for _ in range(3):
        claim(store, RUN, new_writer())

    assert claim(store, replace(RUN, run_id="another"), new_writer()).generation == 4


def test_claim_whose_answer_was_lost_is_made_once_more() -> None:
    store, writer = MemoryStore(), new_writer()

    claimed = [claim(store, RUN, writer, is_mending=is_mending) for is_mending in (False, True)]

    assert claimed[0] == claimed[1] == read_run(store)
    assert claimed[0].generation == 1


def test_mending_takes_nothing_from_a_newer_writer() -> None:
    store = MemoryStore()
    older = claim(store, RUN, new_writer())
    newer = claim(store, RUN, new_writer())

    with pytest.raises(FencedError, match=r"generation 2; this one is 1"):
        claim(store, older, older.writer, is_mending=True)

    assert read_run(store) == newer


def test_mending_writes_a_record_that_was_removed_by_hand() -> None:
    store = MemoryStore()
    older = claim(store, RUN, new_writer())
    store.delete(RECORD)

    assert claim(store, older, older.writer, is_mending=True).generation == 2


@pytest.mark.parametrize("content", [b"", b"{", b"null"])
def test_claim_replaces_a_record_that_cannot_be_read(content: bytes) -> None:
    store = MemoryStore()
    store.put(RECORD, [content])

    assert read_run(store) is None
    assert claim(store, RUN, new_writer()).generation == 1


def test_guard_lets_the_newest_writer_publish() -> None:
    store = MemoryStore()
    run = claim(store, RUN, new_writer())

    guard_of(store, run)()


def test_guard_stops_an_older_writer_and_names_the_newer() -> None:
    store = MemoryStore()
    older = claim(store, RUN, new_writer())
    claim(store, RUN, new_writer())

    with pytest.raises(FencedError, match=r"generation 2; this one is 1") as raised:
        guard_of(store, older)()
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(raised.value)


def test_guard_stops_the_writer_of_the_same_generation_that_lost() -> None:
    store = MemoryStore()
    run = claim(store, RUN, new_writer())

    with pytest.raises(FencedError):
        guard_of(store, replace(run, writer="host:1:word"))()


def test_guard_does_not_mind_a_record_that_was_removed_by_hand() -> None:
    store = MemoryStore()
    run = claim(store, RUN, new_writer())
    store.delete(RECORD)

    guard_of(store, run)()


def test_writers_that_claim_at_once_get_generations_of_their_own(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    script = (
        "import sys; from tests.fakes import RUN;"
        "from trm_dist.checkpoint.runs import claim, new_writer;"
        "from trm_dist.checkpoint.store import LocalStore;"
        "print([claim(LocalStore(sys.argv[1]), RUN, new_writer()).generation for _ in range(5)])"
    )
    command = [sys.executable, "-c", script, directory]
    racing = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    taken = [number for each in racing for number in json.loads(each.communicate()[0])]

    assert sorted(taken) == list(range(1, 21))


# -- reading ---------------------------------------------------------------------------------------


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
        json.dumps({**RUN.summary(), "generation": "1"}).encode(),
        json.dumps({**RUN.summary(), "writer": None}).encode(),
        json.dumps({**RUN.summary(), "branch": True}).encode(),
        b"[" * 100_000,
    ],
)
def test_record_that_cannot_be_read_is_none(content: bytes) -> None:
    store = MemoryStore()
    store.put(RECORD, [content])

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
