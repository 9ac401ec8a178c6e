"""`ls`, `inspect` and `verify`: for people, and for scripts that read JSON and exit codes."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import RUN, make_bytes, make_state, torch_saved
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.state import digest
from trm_dist.cli import main
from trm_dist.progress import COUNTERS

COMMANDS = ["ls", "inspect", "verify"]


@pytest.fixture(autouse=True)
def outside_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run as a person does; and take back the logging that `main` sets up."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A used directory: batches 9, 10 and 100, latest, and what does not belong there."""
    place = tmp_path / "run"
    (place / ".trm_dist").mkdir(parents=True)
    for batch_count in (9, 10, 100):
        (place / epoch_name(1, batch_count)).write_bytes(make_bytes(batch_count))
    (place / LATEST).write_bytes(make_bytes(100))
    (place / "model.pt").write_bytes(b"foreign")
    (place / "notes.txt").write_bytes(b"foreign")
    return place


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command with --json, and return the one document that stdout holds."""
    main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    return json.loads(captured.out)


# -- all three -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_good_directory_exits_with_0(command: str, arguments: list[str], directory: Path) -> None:
    assert main([command, str(directory), *arguments]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [LATEST, epoch_name(1, 9)])
def test_good_file_exits_with_0(command: str, name: str, directory: Path) -> None:
    assert main([command, str(directory / name)]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["", "missing", "missing/checkpoint_latest.pt", "subdirectory"])
def test_place_without_checkpoints_exits_with_2(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "subdirectory").mkdir()

    assert main([command, str(tmp_path / name)]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is not a checkpoint and holds none" in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_place_without_checkpoints_prints_no_json(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path), "--json"]) == 2

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [["--jsn"], ["a", "b"], ["--json", "maybe", "x"]])
def test_wrong_usage_exits_with_2(command: str, arguments: list[str]) -> None:
    assert main([command, *arguments]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_looking_changes_nothing(command: str, directory: Path) -> None:
    before = {each: each.stat().st_mtime_ns for each in sorted(directory.rglob("*"))}

    main([command, str(directory)])

    assert {each: each.stat().st_mtime_ns for each in sorted(directory.rglob("*"))} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_default_place_is_the_one_of_training(
    command: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.rename(directory.parent / "checkpoints")
    monkeypatch.chdir(directory.parent)

    assert main([command]) == 0


# -- ls --------------------------------------------------------------------------------------------


def test_ls_lists_oldest_first(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed_json(capsys, "ls", str(directory))

    names = [epoch_name(1, 9), epoch_name(1, 10), epoch_name(1, 100), LATEST]
    assert [row["name"] for row in rows] == names


def test_ls_lists_older_branches_first(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, batch_count in ((epoch_name(1, 11), 11), (LATEST, 11)):
        (directory / name).write_bytes(make_bytes(batch_count, replace(RUN, branch=2)))

    rows = printed_json(capsys, "ls", str(directory))

    assert [row["batch_count"] for row in rows] == [9, 10, 100, 11, 11]
    assert [row["branch"] for row in rows] == [1, 1, 1, 2, 2]


def test_ls_tells_counters_size_and_time(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(directory / epoch_name(1, 9), (5.0, 1234.5))

    row = printed_json(capsys, "ls", str(directory))[0]

    assert row == {
        "name": epoch_name(1, 9),
        "epoch": 1,
        "batch_idx": 9,
        "batch_count": 9,
        "branch": 1,
        "bytes": len(make_bytes(9)),
        "modified": 1234.5,
        "has_seal": True,
    }


def test_ls_of_a_file_lists_it_alone(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed_json(capsys, "ls", str(directory / epoch_name(1, 10)))

    assert [row["batch_count"] for row in rows] == [10]


def test_ls_tells_which_file_has_no_seal(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tear(directory / epoch_name(1, 10))

    rows = printed_json(capsys, "ls", str(directory))

    assert {row["name"]: row["batch_count"] for row in rows if not row["has_seal"]} == {
        epoch_name(1, 10): None
    }
    assert len(rows) == 4


def test_ls_with_a_damaged_file_exits_with_0(directory: Path) -> None:
    tear(directory / epoch_name(1, 10))

    assert main(["ls", str(directory)]) == 0


def test_ls_prints_a_line_for_each_file(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tear(directory / epoch_name(1, 10))

    main(["ls", str(directory)])

    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["name", "epoch", "batch"]
    damaged = [line.split()[0] for line in lines if "damaged: no seal" in line]
    assert damaged == [epoch_name(1, 10)]
    assert len(lines) == 4


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_of_a_directory_shows_the_newest(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed_json(capsys, "inspect", str(directory))

    assert (shown["name"], shown["batch_count"]) == (LATEST, 100)


def test_inspect_shows_an_epoch_file_that_is_newer_than_latest(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / LATEST).write_bytes(make_bytes(10))

    assert printed_json(capsys, "inspect", str(directory))["name"] == epoch_name(1, 100)


def test_inspect_shows_what_a_file_holds(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed_json(capsys, "inspect", str(directory / epoch_name(1, 9)))

    state = make_state(9)
    plain = {key: shown[key] for key in (*COUNTERS, "config", "dataset", "world", "run")}
    assert plain == {key: state[key] for key in plain}
    assert shown["digest"] == digest(state)
    assert shown["num_parameters"] == 11 * 8 + 8 * 8 + 5


def test_inspect_prints_every_counter_for_people(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(directory / epoch_name(1, 9))])

    lines = capsys.readouterr().out.splitlines()
    assert {f"{name}: {make_state(9)[name]}" for name in COUNTERS} <= set(lines)


def test_inspect_digest_prints_nothing_else(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--digest", str(directory / epoch_name(1, 9))]) == 0

    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (digest(make_state(9)) + "\n", "")


@pytest.mark.parametrize("hurt", [tear, flip])
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--digest"]])
def test_inspect_of_a_damaged_file_exits_with_1(
    hurt: Any, arguments: list[str], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hurt(directory / LATEST)

    assert main(["inspect", str(directory / LATEST), *arguments]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{LATEST} is damaged" in captured.err


# -- verify ----------------------------------------------------------------------------------------


def test_verify_calls_every_good_file_good(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(directory)]) == 0

    names = [epoch_name(1, 9), epoch_name(1, 10), epoch_name(1, 100), LATEST]
    assert capsys.readouterr().out.splitlines() == [f"{name}: good" for name in names]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_verify_of_any_damaged_file_exits_with_1(directory: Path, arguments: list[str]) -> None:
    flip(directory / epoch_name(1, 10))

    assert main(["verify", str(directory), *arguments]) == 1


def test_verify_names_each_damaged_file(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(directory / epoch_name(1, 10))
    tear(directory / LATEST)

    main(["verify", str(directory)])

    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in lines if "DAMAGED" in line) == [
        epoch_name(1, 10),
        LATEST,
    ]
    assert len(lines) == 4


def test_verify_tells_what_is_wrong_in_json(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / epoch_name(1, 10)).write_bytes(make_bytes(9))

    rows = printed_json(capsys, "verify", str(directory))

    bad = [row for row in rows if not row["is_good"]]
    assert bad == [
        {
            "name": epoch_name(1, 10),
            "is_good": False,
            "damage": ["its name does not say epoch 1 batch 9"],
        }
    ]
    assert all(row["damage"] == [] for row in rows if row["is_good"])


def test_verify_of_a_good_file_beside_a_damaged_one_exits_with_0(directory: Path) -> None:
    flip(directory / epoch_name(1, 10))

    assert main(["verify", str(directory / epoch_name(1, 9))]) == 0


@pytest.mark.parametrize("name", ["model.pt", "notes.txt"])
def test_verify_of_a_foreign_file_exits_with_1(name: str, directory: Path) -> None:
    assert main(["verify", str(directory / name)]) == 1


def test_verify_takes_a_copy_under_any_name(directory: Path) -> None:
    (directory / "copy.pt").write_bytes(make_bytes(9))

    assert main(["verify", str(directory / "copy.pt")]) == 0


@pytest.mark.parametrize("name", [LATEST, FINAL])
def test_verify_finds_an_empty_file(name: str, directory: Path) -> None:
    (directory / name).write_bytes(b"")

    assert main(["verify", str(directory)]) == 1


def test_newest_of_a_directory_belongs_to_the_newest_run(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = replace(RUN, run_id="another", created_at=RUN.created_at + 1)
    (directory / epoch_name(1, 3)).write_bytes(make_bytes(3, later))

    assert printed_json(capsys, "inspect", str(directory))["batch_count"] == 3
    assert printed_json(capsys, "ls", str(directory))[-1]["name"] == epoch_name(1, 3)


def test_sealed_file_without_counters_is_damaged_and_no_crash(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / LATEST).write_bytes(torch_saved({"a": 1}, {"branch": 1}))

    rows = printed_json(capsys, "ls", str(directory))
    assert [row["has_seal"] for row in rows if row["name"] == LATEST] == [False]
    assert main(["verify", str(directory)]) == 1


# -- prune -----------------------------------------------------------------------------------------


def names_in(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir() if each.name != ".trm_dist"}


def test_prune_removes_all_but_the_newest(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names_in(directory)

    assert main(["prune", str(directory), "--keep-last", "1"]) == 0

    assert before - names_in(directory) == {epoch_name(1, 9), epoch_name(1, 10)}
    assert capsys.readouterr().out.splitlines() == [
        f"removed {epoch_name(1, 9)}",
        f"removed {epoch_name(1, 10)}",
    ]


def test_prune_keeps_every_nth(directory: Path) -> None:
    assert main(["prune", str(directory), "--keep-last", "1", "--keep-every", "5"]) == 0

    assert {epoch_name(1, 10), epoch_name(1, 100)} <= names_in(directory)
    assert epoch_name(1, 9) not in names_in(directory)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_dry_run_of_prune_tells_and_removes_nothing(
    directory: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    before = names_in(directory)
    command = ["prune", str(directory), "--keep-last", "1", "--multipart", "--dry-run", *more]

    assert main(command) == 0

    assert names_in(directory) == before
    out = capsys.readouterr().out
    if more:
        removed = [epoch_name(1, 9), epoch_name(1, 10)]
        assert json.loads(out) == {"removed": removed, "uploads": [], "dry_run": True}
    else:
        assert "would remove" in out


def test_prune_counts_whole_checkpoints_only(directory: Path) -> None:
    flip(directory / epoch_name(1, 100))

    assert main(["prune", str(directory), "--keep-last", "1"]) == 0

    left = names_in(directory)
    assert {epoch_name(1, 100), epoch_name(1, 10), LATEST} <= left
    assert epoch_name(1, 9) not in left


def test_prune_leaves_other_branches_alone(directory: Path) -> None:
    later = replace(RUN, branch=2)
    (directory / epoch_name(2, 1)).write_bytes(make_bytes(101, later))

    assert main(["prune", str(directory), "--keep-last", "1"]) == 0

    assert {epoch_name(1, count) for count in (9, 10, 100)} <= names_in(directory)


def test_prune_removes_what_dead_writers_have_left(directory: Path) -> None:
    (directory / ".trm_dist" / "tmp-0123").write_bytes(b"torn")

    assert main(["prune", str(directory), "--multipart"]) == 0

    assert list((directory / ".trm_dist").iterdir()) == []
    assert len(names_in(directory)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what may go"),
        (["--keep-last", "-1"], "must not be negative"),
        (["--keep-last", "0", "--keep-every", "5"], "say what may go"),
    ],
)
def test_prune_without_a_wish_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["prune", str(directory), *arguments]) == 2

    assert message in capsys.readouterr().err


def test_prune_of_an_empty_place_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(tmp_path), "--keep-last", "1"]) == 2

    assert "holds no checkpoint" in capsys.readouterr().err


def test_check_tells_what_memory_snapshots_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--checkpoint-dir", str(tmp_path / "run"), "--dataset", "sudoku4:train?count=50"]

    assert main(["check", *where, "--dim", "32"]) == 0

    assert "memory: 3 snapshots of 0.4 MiB a node in /dev/shm" in capsys.readouterr().out
