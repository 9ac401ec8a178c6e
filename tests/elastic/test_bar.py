"""The live bar, on a real pseudo terminal, while workers are killed."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.elastic.harness import SMALL, Training, as_arguments, kill, started

BAR = re.compile(r"epoch (\d+)/4 batch (\d+)/40 \|.*\| \S+ left, loss .* (\d+) restart\(s\)")


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, column = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[K|\x1b\[A)", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            assert "\x1b" not in part, repr(part)
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return lines


def shown(run: Training) -> str:
    return run.output.read_bytes().decode()


@pytest.mark.parametrize("launcher", ["launch", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_bar_goes_on_through_restarts_and_no_line_is_torn(directory: Path, launcher: str) -> None:
    flags = SMALL | {"--checkpoint-dir": str(directory), "--log-format": "text", "--epochs": "4"}
    command = [sys.executable, "-m", "trm_dist", "launch", "--nproc-per-node=2"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--max-restarts=1", "-m", "trm_dist", "train"]
    program = shlex.join([*command, *as_arguments(flags)])
    terminal = ["script", "-qefc", f"stty cols 160 rows 30; exec {program}", "/dev/null"]
    with started(directory, terminal) as run:
        run.wait_for(lambda: BAR.search(shown(run)), "the bar")
        worker = next(pid for pid in run.processes() if is_worker(pid))
        kill(worker)
        assert run.end() == 0, shown(run)[-3000:]
        lines = screen(shown(run))
    restarts = [int(found[3]) for found in BAR.finditer(shown(run))]
    assert sorted(set(restarts)) == [0, 1]
    # What is left on the screen: the last bar, whole log records, and what torchrun says.
    assert len([line for line in lines if BAR.match(line)]) == 1
    told = [line for line in lines if "checkpoint committed batch=" in line]
    assert len(told) >= 40 // 7
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d INFO checkpoint .* waited=[.\d]+", x) for x in told)
    if launcher == "torchrun":
        assert any(re.match(r"E\d+ .* failed \(exitcode: -9\)", line) for line in lines)
    assert re.search(r"epoch 4/4 batch 40/40 \|█+\|", "\n".join(lines))
    assert any(re.match(r"\d\d:\d\d:\d\d INFO finished: 40 batches", line) for line in lines)


def is_worker(pid: int) -> bool:
    """Whether it is the worker with rank 0."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        is_forked = Path(f"/proc/{pid}/comm").read_text().strip() == "trm worker 0"
    except OSError:
        return False
    is_stub = b"stub.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return is_forked or (b"RANK=0" in variables and not is_stub)
