"""The table of the benchmark, its picture, and how parts become one; no time is measured."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks.__main__ import Bench
from tests.benchmarks.position_peers import move
from tests.benchmarks.table import (
    Axis,
    Goal,
    Row,
    Spread,
    draw,
    from_json,
    table,
    to_json,
    verdict,
)
from tests.guides import ROOT

FASTER = Row(
    subject="step", what="mlp", unit="samples/s", better="more", ours=[30.0, 30.0, 33.0],
    peers={"plain": [10.0, 15.0, 11.0], "other": [20.0, 10.0, 22.0]},
    limit={"matmul": [60.0, 60.0, 60.0]}, goal=Goal(1.5),
)  # fmt: skip
SLOWER = Row(
    subject="save", what="1 MiB", unit="ms", better="less", ours=[4.0, 4.0],
    peers={"threads": [1.0, 2.0]}, limit={"copy": [2.0, 2.0]}, goal=Goal(1.2, "copy"),
)  # fmt: skip
LOST = Row(
    subject="lost", what="kill", unit="batches", better="less", ours=[0.0, 0.0],
    peers={"others": [3.0, 0.0]}, goal=Goal(0.0, beside=None),
)  # fmt: skip


def cells(row: Row) -> list[list[str]]:
    """The lines of one row, without the head of the table."""
    lines = table([row]).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0], (2.0, 2.0, 2.0)),
        ([1.0, 3.0], (1.5, 2.0, 2.5)),
        ([4.0, 1.0, 2.0, 3.0, 5.0], (2.0, 3.0, 4.0)),
        ([float("inf"), 1.0, 2.0], (1.0, 2.0, float("inf"))),
    ],
)
def test_spread_is_median_and_quartiles(values: list[float], expected: tuple[float, ...]) -> None:
    found = Spread.of(values)
    assert (found.low, found.median, found.high) == expected


def test_ratio_is_taken_round_by_round() -> None:
    drifting = replace(SLOWER, ours=[2.0, 20.0], peers={"threads": [1.0, 10.0]})
    assert drifting.ratio("threads") == Spread(2.0, 2.0, 2.0)


def test_ratio_of_nothing_to_nothing_is_one() -> None:
    assert LOST.ratio("others").median == 0.5
    assert LOST.advantage("others") == Spread(1.0, 1.0, float("inf"))


def test_best_peer_depends_on_the_better_direction() -> None:
    assert FASTER.best == "other"
    assert replace(FASTER, better="less").best == "plain"
    assert replace(FASTER, peers={}, goal=None).best is None


@pytest.mark.parametrize(
    ("row", "is_behind", "is_met"),
    [
        (FASTER, False, True),
        (replace(FASTER, goal=Goal(1.51)), False, False),
        (replace(FASTER, goal=Goal(0.6, "matmul")), False, False),
        (replace(FASTER, peers={}), False, None),
        (replace(FASTER, goal=None), False, None),
        (SLOWER, True, False),
        (replace(SLOWER, goal=Goal(2.0, "copy")), True, True),
        (LOST, False, True),
        (replace(LOST, ours=[1.0, 1.0]), False, False),
    ],
)
def test_row_knows_whether_it_is_behind_and_meets_its_goal(
    row: Row, is_behind: bool, is_met: bool | None
) -> None:
    assert (row.is_behind, row.is_met) == (is_behind, is_met)


def test_rows_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="step: mlp: ways with"):
        replace(FASTER, ours=[1.0])


def test_goal_beside_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="held against nothing"):
        replace(FASTER, goal=Goal(1.0, "nobody"))


def test_table_has_a_line_for_each_other_and_the_goal_at_its_own() -> None:
    assert cells(FASTER) == [
        ["step: mlp", "samples/s, more", "30 (30 to 31.5)", "plain", "11 (10.5 to 13)",
         "3 (2.50 to 3)", ""],
        ["", "", "", "other", "20 (15 to 21)", "1.50 (1.50 to 2.25)", ">= 1.50 met"],
        ["", "", "", "limit: matmul", "60", "0.500 (0.500 to 0.525)", ""],
    ]  # fmt: skip


def test_table_has_an_absolute_goal_beside_ours() -> None:
    assert [line[-1] for line in cells(LOST)] == ["<= 0 met"]
    assert cells(replace(LOST, peers={})) == [
        ["lost: kill", "batches, less", "0", "", "", "", "<= 0 met"]
    ]


def test_verdict_says_who_is_ahead_and_what_is_missed() -> None:
    assert verdict([FASTER, SLOWER, LOST]).splitlines() == [
        "A peer is ahead:",
        "- save: 1 MiB: threads, 2.67x as good as ours",
        "Goals that are missed:",
        "- save: 1 MiB: <= 1.20 MISSED, beside copy",
    ]
    assert verdict([FASTER, LOST]) == "No peer is ahead.\nNo goal is missed."


def test_verdict_says_so_where_the_spread_leaves_it_open() -> None:
    close = replace(SLOWER, ours=[4.0, 4.0], peers={"threads": [5.0, 2.0]}, goal=None)
    assert "within the spread" in verdict([close])


def test_rows_come_back_from_json_as_they_were() -> None:
    assert from_json(to_json([FASTER, SLOWER, LOST], {"cores": "2"})) == [FASTER, SLOWER, LOST]


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [([2.0], -1, 1), ([0.004, 3.0], -3, 1), ([500.0, 0.0, float("inf")], -1, 3), ([], -1, 1)],
)
def test_axis_holds_all_values_and_one(values: list[float], first: int, last: int) -> None:
    axis = Axis.over(values)
    assert (axis.first, axis.last) == (first, last)
    assert [0.0 <= axis.place(each) <= 1.0 for each in values] == [True] * len(values)
    assert axis.place(0.0) == 0.0
    assert axis.place(float("inf")) == 1.0
    assert "1x" in [label for _, label in axis.ticks()]


def test_picture_has_a_dot_for_each_other_in_its_colour() -> None:
    picture = ElementTree.fromstring(draw([FASTER, SLOWER, LOST], "a <title>"))
    name = "{http://www.w3.org/2000/svg}"
    dots = [each.get("class") for each in picture.iter(f"{name}circle")]
    assert dots == ["ahead", "ahead", "limit", "behind", "limit", "ahead"]
    texts = [each.text for each in picture.iter(f"{name}text")]
    assert {"a <title>", "step: mlp", "limit: matmul", "1.50x"} <= set(texts)


def test_counters_are_moved_wherever_they_are() -> None:
    state = {"a": [{"completed": 9, "ready": 10}], "seen": 20, "other": 3, "flag": True, "x": 10.0}
    assert move(state, 1000) == {
        "a": [{"completed": 999, "ready": 1000}], "seen": 2000, "other": 3, "flag": True, "x": 10.0,
    }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A double of a part: a process that writes rows, or fails after it has."""

    rows: list[Row]
    code: int = 0

    def command(self, size: str, rows: Path) -> list[str]:
        program = (
            "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
        )
        content = to_json([replace(each, what=f"{each.what} {size}") for each in self.rows])
        return [sys.executable, "-c", program, str(rows), content, str(self.code)]


def test_bench_makes_one_table_of_all_parts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "quick", {"one": Measured([FASTER]), "two": Measured([LOST, SLOWER])})
    bench.run(["one", "two"])

    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["setting"]["size"] == "quick"
    titles = [each.title for each in from_json(json.dumps(content))]
    assert titles == ["step: mlp quick", "lost: kill quick", "save: 1 MiB quick"]
    text = (tmp_path / "benchmark.md").read_text()
    assert all(each in text for each in (*titles, "A peer is ahead:", "Goals that are missed:"))
    assert ElementTree.parse(tmp_path / "benchmark.svg").getroot().get("viewBox")


def test_bench_goes_on_and_says_so_when_a_part_fails(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "tiny", {"one": Measured([FASTER], code=3), "two": Measured([LOST])})
    bench.run(["one", "two"])

    assert bench.failed == ["one"]
    assert [each.title for each in bench.rows()] == ["lost: kill tiny"]
    assert "Not measured, see log.txt: one." in (tmp_path / "benchmark.md").read_text()


SLEEPS = """
import os, pathlib, time
pathlib.Path("new").write_text(str(os.getpid()))
os.rename("new", "pid")
time.sleep(60)
"""
TOLD_TO_STOP = f"""
import sys
from pathlib import Path
from tests.benchmarks.__main__ import Bench
from tests.benchmarks.table import end_in_order

class Sleeping:
    def command(self, size, rows):
        return [sys.executable, "-c", {SLEEPS!r}]

end_in_order()
Bench(Path(), "tiny", {{"one": Sleeping()}}).run(["one"])
"""


def test_bench_ends_what_it_has_started_when_it_is_told_to_stop(tmp_path: Path) -> None:
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen([sys.executable, "-c", TOLD_TO_STOP], cwd=tmp_path, env=variables)
    try:
        while not (tmp_path / "pid").exists():
            assert bench.poll() is None
            time.sleep(0.01)

        bench.terminate()

        assert bench.wait(30) == 143
    finally:
        bench.kill()
        bench.wait()
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_bench_keeps_the_other_parts_of_the_same_size(tmp_path: Path) -> None:
    first = Bench(tmp_path, "quick", {"one": Measured([FASTER]), "two": Measured([LOST])})
    first.run(["one", "two"])
    again = Bench(tmp_path, "quick", {"one": Measured([SLOWER]), "two": Measured([LOST])})
    again.run(["one"])
    assert [each.title for each in again.rows()] == ["save: 1 MiB quick", "lost: kill quick"]
    assert Bench(tmp_path, "full", {"one": Measured([])}).rows() == []
    again.forget()
    assert again.rows() == []


@pytest.mark.parametrize("net", ["mlp", "attn"])
def test_profile_of_a_step_names_its_matrix_products(net: str) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.step_profile", net, "16", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout
