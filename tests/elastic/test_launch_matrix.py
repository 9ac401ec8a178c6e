"""Every signal to every process in every phase: the run goes on, or goes on when started again."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.elastic.harness import Training, Undisturbed, kill, training, wait_until_gone
from tests.elastic.test_kill import assert_same_bits

LARGE_EVALUATION = {"--eval-dataset": "sudoku4:test?count=1000", "--eval-interval": "20"}


def _exists(run: Training, name: str) -> bool:
    return name in run.names()


PHASES: dict[str, Callable[[Training], object]] = {
    "start": lambda run: run.wait_for(lambda: _exists(run, "zygote"), "the zygote"),
    "rendezvous": lambda run: run.wait_for(lambda: _exists(run, "trm agent"), "the agent"),
    "load": lambda run: run.wait_for(lambda: _exists(run, "trm worker 0"), "a worker"),
    "batch": lambda run: run.wait_for_batches(8),
    "save": lambda run: run.wait_for(lambda: run.events("committed"), "a commit"),
    "evaluation": lambda run: run.wait_for(lambda: run.told() == 20, "the evaluation"),
    "end": lambda run: run.wait_for(lambda: run.told() == 80, "the last batch"),
}
RECEIVERS = ["supervisor", "zygote", "trm agent", "stub.py", "trm worker 0", "trm worker 1"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]

CASES = [
    (phase, receiver, signum) for phase in PHASES for receiver in RECEIVERS for signum in SIGNALS
]
OFTEN = CASES[:: len(RECEIVERS) * len(SIGNALS) + 5]
"""A few of them for every day, each in another phase, of another receiver."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("phase", "receiver", "signum"),
    [case if case in OFTEN else pytest.param(*case, marks=pytest.mark.soak) for case in CASES],
)
def test_signal_costs_nothing_that_was_finished(
    directory: Path, undisturbed: Undisturbed, phase: str, receiver: str, signum: int
) -> None:
    flags = LARGE_EVALUATION if phase == "evaluation" else {}
    with training(directory, launch=2, flags=flags) as first:
        PHASES[phase](first)
        if receiver == "supervisor":
            kill(first.process.pid, signum)
        elif _exists(first, receiver):
            kill(first.named(receiver), signum)
        else:
            pytest.skip(f"there is no {receiver} in this phase yet")
        code = first.end()
        wait_until_gone(first.processes())
    if receiver != "supervisor":
        assert code == 0, first.messages()
    assert code in {0, 128 + signum, -signum, 143}, first.messages()
    runs = [first]
    if code:
        with training(directory, launch=2, flags=flags) as second:
            assert second.end() == 0, second.messages()
        assert second.events("started")[0]["batch_count"] >= first.told()
        runs.append(second)
    assert_same_bits(runs, undisturbed)
