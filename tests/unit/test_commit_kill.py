"""SIGKILL at every line of a commit: what stood before stands, and what is visible is whole.

The kills happen in children of a small process that never imports torch, this file run as a
program: it forks one child for every line of ours that a scenario executes, from becoming the
writer to letting old files go, and the child kills itself there. What each kill left is written
down as JSON and judged by the tests.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.fakes import RUN, make_summary, snapshot_of
from trm_dist.checkpoint import catalog, publish, retention, runs, store, writer
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name, parse_epoch_name
from trm_dist.checkpoint.runs import claim
from trm_dist.checkpoint.seal import verify_seal
from trm_dist.checkpoint.store import HIDDEN, LocalStore
from trm_dist.checkpoint.writer import Writer
from trm_dist.errors import CorruptCheckpointError

ROOT = Path(__file__).parents[2]
TRACED = {each.__file__ for each in (catalog, publish, retention, runs, store, writer)}
KEEP_LAST = 2

# Commits (batch_count, names besides latest); the first one happens before the kill.
SCENARIOS: dict[str, list[tuple[int, list[str]]]] = {
    "epoch file": [(1, []), (2, [epoch_name(1, 2)])],
    "latest alone": [(1, [epoch_name(1, 1)]), (2, [])],
    "same names again": [(1, [FINAL]), (1, [FINAL])],
    "last batches": [(1, []), (2, [epoch_name(1, 2)]), (3, [FINAL])],
    "old ones go": [(number, [epoch_name(1, number)]) for number in (1, 2, 3, 4)],
}


@dataclass
class Kill:
    """What a kill at one executed line left, and what a new writer made of it."""

    line: int
    num_done: int
    """Commits of the scenario that had returned."""
    files: dict[str, int | None]
    """Batch count that each file at the top level holds; None: it is not whole."""
    hidden: list[str]
    generation: int
    """Of the killed writer, when it asks for its claim again."""
    hidden_after_removal: list[str]
    names_of_later: list[str]
    """What a later commit of batch 9 says it wrote."""
    files_after_later: dict[str, int | None]


# -- the small process -----------------------------------------------------------------------------


def commit(store: LocalStore, name: str, batch_count: int, own_names: list[str]) -> list[str]:
    run = claim(store, RUN, name)
    writer = Writer(store, run, keep_last=KEEP_LAST)
    return writer.commit(snapshot_of(make_summary(batch_count)), own_names).names


def killer(line: int, traced: set[str]) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that kills this process before the n-th line of some files."""
    num_lines = 0

    def on_line(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        if num_lines == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, _event: str, _arg: Any) -> Any:
        return on_line if frame.f_code.co_filename in traced else None

    return on_call


def run_and_die(directory: str, steps: list[tuple[int, list[str]]], line: int, log: int) -> None:
    """Be the child: commit step by step, telling of each that is done, until the kill."""
    store = LocalStore(directory)
    sys.settrace(killer(line, TRACED))
    for step in steps:
        commit(store, "child", *step)
        os.write(log, b".")
    os._exit(0)


def held(store: LocalStore) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for entry in store.entries():
        try:
            found[entry.name] = verify_seal(store.read(entry.name)).summary["batch_count"]
        except CorruptCheckpointError:
            found[entry.name] = None
    return found


def kill_at(directory: str, steps: list[tuple[int, list[str]]], line: int) -> Kill | None:
    """Kill a child at a line; None: it ended before that."""
    store = LocalStore(directory)
    commit(store, "parent", *steps[0])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        run_and_die(directory, steps[1:], line, writing)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as log:
        num_done = 1 + len(log.read())
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0
        assert num_done == len(steps)
        return None
    hidden = f"{directory}/{HIDDEN}"
    files, left = held(store), sorted(os.listdir(hidden))
    later = LocalStore(directory)
    generation = claim(later, RUN, "child").generation
    later.remove_leftovers()
    left_after_removal = sorted(os.listdir(hidden))
    names = commit(later, "later", 9, [epoch_name(1, 9)])
    return Kill(line, num_done, files, left, generation, left_after_removal, names, held(later))


def kill_everywhere(directory: str, scenario: str) -> None:
    assert "torch" not in sys.modules, "committing is quick to kill"
    kills, line = [], 1
    while kill := kill_at(f"{directory}/{line}", SCENARIOS[scenario], line):
        kills.append(asdict(kill))
        line += 1
    json.dump(kills, sys.stdout)


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(SCENARIOS))
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def kills(scenario: str) -> list[Kill]:
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # fsync costs nothing there
    with tempfile.TemporaryDirectory(dir=in_memory) as directory:
        command = [sys.executable, "-m", __name__, directory, scenario]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return [Kill(**each) for each in json.loads(output)]


def test_kills_hit_every_line(kills: list[Kill], scenario: str) -> None:
    assert [kill.line for kill in kills] == list(range(1, len(kills) + 1))
    assert len(kills) >= 40 * (len(SCENARIOS[scenario]) - 1)


def test_kills_hit_every_commit_with_its_temporary_files(kills: list[Kill], scenario: str) -> None:
    interrupted = {kill.num_done for kill in kills if temporary(kill)}

    assert interrupted == set(range(1, len(SCENARIOS[scenario])))


def temporary(kill: Kill) -> list[str]:
    return [name for name in kill.hidden if name.startswith("tmp-")]


def test_every_visible_file_is_whole_after_any_kill(kills: list[Kill]) -> None:
    torn = [(kill.line, kill.files) for kill in kills if None in kill.files.values()]

    assert torn == []


def test_top_level_holds_documented_names_only_after_any_kill(
    kills: list[Kill], scenario: str
) -> None:
    documented = {LATEST}.union(*(names for _, names in SCENARIOS[scenario]))

    assert set().union(*(kill.files for kill in kills)) <= documented


def test_latest_holds_the_last_commit_or_the_interrupted_one(
    kills: list[Kill], scenario: str
) -> None:
    for kill in kills:
        done, interrupted = SCENARIOS[scenario][kill.num_done - 1 : kill.num_done + 1]

        assert kill.files[LATEST] in {done[0], interrupted[0]}


def test_published_names_stay_after_any_kill(kills: list[Kill], scenario: str) -> None:
    for kill in kills:
        epochs = [number for name, number in kill.files.items() if parse_epoch_name(name)]
        last = sorted(number or 0 for number in epochs)[-KEEP_LAST:]

        for batch_count, names in SCENARIOS[scenario][: kill.num_done]:
            if len(last) < KEEP_LAST or batch_count >= last[0]:  # retention wants it
                assert {kill.files.get(name) for name in names} <= {batch_count}


def test_every_claim_is_answered_the_same_after_any_kill(kills: list[Kill]) -> None:
    assert {kill.generation for kill in kills} == {2}


def test_latest_never_stands_before_its_own_file_does(kills: list[Kill], scenario: str) -> None:
    own_names = dict(SCENARIOS[scenario])

    for kill in kills:
        batch_count = kill.files[LATEST]

        assert {kill.files.get(name) for name in own_names[batch_count or 0]} <= {batch_count}


def test_leftovers_of_any_kill_are_removed(kills: list[Kill]) -> None:
    left = {name for kill in kills for name in kill.hidden_after_removal}

    assert left == {"lock", "run.json"}


def test_later_commit_works_after_any_kill(kills: list[Kill]) -> None:
    for kill in kills:
        later = {epoch_name(1, 9): 9, LATEST: 9}

        assert kill.names_of_later == list(later)
        assert kill.files_after_later == kept(kill.files | later)


def kept(files: dict[str, int | None]) -> dict[str, int | None]:
    """What retention leaves."""
    epochs = sorted(filter(parse_epoch_name, files), key=lambda name: files[name] or 0)
    return {name: files[name] for name in files if name not in epochs[:-KEEP_LAST]}


if __name__ == "__main__":
    kill_everywhere(*sys.argv[1:])
