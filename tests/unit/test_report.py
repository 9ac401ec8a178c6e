"""What is told of a run, from made-up ledgers next to real checkpoints."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.fakes import RUN, make_bytes
from tests.lives import Life, troubled_run
from trm_dist.checkpoint.names import LATEST, epoch_name
from trm_dist.checkpoint.runs import claim, new_writer
from trm_dist.checkpoint.store import LocalStore
from trm_dist.cli import main
from trm_dist.observe.ledger import Spent
from trm_dist.report import Story, page, tell_story

VOID = {"meta", "link", "br", "rect", "path", "img", "hr", "input"}


class Structure(HTMLParser):
    """Checks that what is opened is closed, and keeps what refers to somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.targets += [value or "" for name, value in attrs if name in {"href", "src"}]
        self.names += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "run"
    troubled_run(place)
    return place


@pytest.fixture
def story(directory: Path) -> Story:
    return tell_story(str(directory), is_verifying=True)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 0
    return capsys.readouterr().out


def test_table_says_where_the_time_went(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(capsys, str(directory), "--output", str(tmp_path / "page.html")).splitlines()

    assert lines[0] == (
        "The run has finished after batch 10 of 10. It was interrupted 2 times; of 38.0 s it has "
        "trained 52.6%, and 1.0 s of work had to be done again."
    )
    rows = [line.split() for line in lines if line.startswith(("productive", "down", "in all"))]
    assert rows == [
        ["productive", "20.0", "s", "52.6%"], ["down", "11.0", "s", "28.9%"],
        ["in", "all", "38.0", "s", "100.0%"],
    ]  # fmt: skip
    assert "worker 1: killed by SIGKILL" in lines[15]
    assert "was told to stop (SIGTERM)" in lines[16]
    assert lines[17].endswith("finished")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_json_is_one_document_with_the_same_figures(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(told(capsys, str(directory), "--json", "--output", "none"))

    assert found["state"] == "finished"
    assert sum(found["seconds"].values()) == found["wall_seconds"] == 38
    assert found["goodput"] == 20 / 38
    assert [each["world_size"] for each in found["starts"]] == [2, 2, 3]
    assert [each["is_good"] for each in found["checkpoints"]] == [True, True, True]
    assert not (tmp_path / "report.html").exists()


def test_damaged_checkpoint_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / epoch_name(1, 5)
    path.write_bytes(path.read_bytes()[:-9])

    assert f"DAMAGED: {epoch_name(1, 5)}" in told(capsys, str(directory), "--output", "none")
    assert "<strong" in page(tell_story(str(directory), is_verifying=True))


def test_checkpoints_need_not_be_read(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, str(directory), "--output", "none", "--no-verify")

    assert "3 checkpoints, not checked" in out


def test_page_is_whole_and_refers_to_nothing_outside(story: Story) -> None:
    structure = Structure()
    structure.feed(page(story))

    assert structure.open == []
    inside = {f"#{each}" for each in structure.names}
    assert set(structure.targets) <= inside | {"data:,"}
    assert not re.search(r"https?://|url\(|@import|<script", page(story))


def test_page_shows_every_start_and_checkpoint(story: Story) -> None:
    text = page(story)

    for each in (
        "worker 1: killed by SIGKILL",
        "was told to stop (SIGTERM)",
        "d" * 64,
        "0.1 (given)",
    ):
        assert each in text
    assert "2 workers became 3" in text
    assert text.count("yes, every byte") == 3


def test_what_a_run_says_of_itself_is_text_and_no_markup(tmp_path: Path) -> None:
    life = Life(100.0, cause="<script>alert(1)</script>")
    life.train_from(0)
    life.batch(1)
    later = Life(110.0, cause='worker 0: ValueError: "<img src=x onerror=y>"')
    later.train_from(1)
    for each in (life, later):
        each.leave_in(tmp_path)
    (tmp_path / LATEST).write_bytes(make_bytes(1))

    text = page(tell_story(str(tmp_path), is_verifying=False))

    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_killed_start_without_a_word_says_so(tmp_path: Path) -> None:
    for started_at, batch_count in ((100.0, 0), (110.0, 1)):
        life = Life(started_at)
        life.train_from(batch_count)
        life.batch(1)
        life.leave_in(tmp_path)
    (tmp_path / LATEST).write_bytes(make_bytes(1))

    story = tell_story(str(tmp_path), is_verifying=False)

    assert "could leave no word" in story.ending(0)
    assert story.state == "silent"  # since 1970
    assert replace(story, told_at=112.0).state == "running"
    assert replace(story, told_at=112.0).ending(1) == ""


def test_stop_after_which_the_same_torchrun_has_gone_on_was_its_own(tmp_path: Path) -> None:
    for started_at, batch_count in ((100.0, 0), (110.0, 1)):
        life = Life(started_at, launched_at=95.0)
        life.train_from(batch_count)
        life.batch(1)
        life.ledger.stop("SIGTERM")
        life.leave_in(tmp_path)
    (tmp_path / LATEST).write_bytes(make_bytes(1))

    story = tell_story(str(tmp_path), is_verifying=False)

    assert "another worker had failed" in story.ending(0)
    assert story.ending(1) == "was told to stop (SIGTERM)"


def test_start_that_finds_all_done_changes_nothing(directory: Path) -> None:
    again = Life(4000.0)
    again.train_from(10)
    again.finish()
    again.leave_in(directory)

    story = tell_story(str(directory), is_verifying=False)

    assert len(story.starts) == 3
    assert story.account.total_s == 38
    assert story.interruptions == 2


def test_run_that_goes_on_after_its_end_was_not_interrupted_by_it(directory: Path) -> None:
    more = Life(4000.0)
    more.train_from(10)
    more.batch(2)
    more.leave_in(directory)

    story = tell_story(str(directory), is_verifying=False)

    assert story.account.total_s == 40
    assert story.interruptions == 2


def test_page_that_has_no_store_is_a_user_error(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(directory), "--output", "nosuch://bucket/report.html"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_loss_of_lost_work_is_not_part_of_the_curve(tmp_path: Path) -> None:
    first, second = Life(100.0), Life(120.0)
    first.train_from(0)
    for _ in range(6):
        first.batch(1, loss=1.0)
    second.train_from(3)
    for _ in range(3):
        second.batch(1, loss=2.0)
    for each in (first, second):
        each.leave_in(tmp_path)
    (tmp_path / LATEST).write_bytes(make_bytes(1))

    story = tell_story(str(tmp_path), is_verifying=False)
    (path,) = re.findall(r'class="curve c1" d="([^"]+)"', page(story))[:1]

    lefts = [float(each) for each in re.findall(r"[ML]([\d.]+) ", path)]
    assert lefts == sorted(set(lefts))
    assert len(lefts) == 6


def test_run_that_was_replaced_is_another_one(directory: Path) -> None:
    store = LocalStore(str(directory))
    claim(store, replace(RUN, run_id="run-2", created_at=200.0), new_writer())

    with pytest.raises(Exception, match="holds no ledger of a run"):
        tell_story(str(directory), is_verifying=False)


def test_run_that_has_only_begun_is_told(tmp_path: Path) -> None:
    life = Life(100.0)
    life.spend(Spent.STARTUP, 1)
    life.train_from(0)
    life.leave_in(tmp_path)
    claim(LocalStore(str(tmp_path)), RUN, new_writer())

    text = page(tell_story(str(tmp_path), is_verifying=True))

    assert "0 / 10" in text


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_directory_without_a_ledger_is_a_user_error(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()

    assert main(["report", str(tmp_path / name)]) == 2
    assert "holds no ledger of a run" in capsys.readouterr().err


def test_page_that_cannot_be_written_is_a_user_error(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(directory), "--output", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
