"""The seconds of a run add up, whatever was done to it."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.elastic.harness import Training, kill, training
from trm_dist.checkpoint.journal import read_journals
from trm_dist.checkpoint.store import open_store
from trm_dist.cli import main
from trm_dist.observe.goodput import Start, parse

pytestmark = pytest.mark.elastic

FLAGS = {"--epochs": "12", "--eval-interval": "50", "--latest-every-s": "2"}


def starts_in(directory: Path) -> list[Start]:
    return [each for each in map(parse, read_journals(open_store(str(directory)))) if each]


def told_at(run: Training, kind: str) -> float:
    return float(run.events(kind)[-1]["time"])


@pytest.mark.parametrize("launch", [2, pytest.param(0, marks=pytest.mark.soak)])
def test_ledger_adds_up_to_the_wall_time_over_a_run_with_kills(
    directory: Path, launch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began_at = time.time()
    workers = 0 if launch else 2
    with training(directory, launch=launch, workers=workers, max_restarts=3, flags=FLAGS) as run:
        for victim in (0, 1):
            run.wait_for_batches(12)
            kill(run.named(f"trm worker {victim}") if launch else run.worker(victim))
            run.wait_for_start(victim + 2)
        run.wait_for_batches(12)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() != 0
    time.sleep(1.0)
    with training(directory, launch=1, flags=FLAGS) as last:
        assert last.end() == 0, last.messages()
        wall_s = told_at(last, "finished") - began_at

    assert main(["report", str(directory), "--output", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["wall_seconds"] == pytest.approx(wall_s, rel=0.01, abs=0.0)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"])
    spent = found["seconds"]
    assert spent["down"] > 1.0
    for name in ("productive", "startup", "restore", "save_stall", "evaluation", "data_wait"):
        assert spent[name] > 0, name
    batches = sum(each["seconds"] for each in [*run.events("batch"), *last.events("batch")])
    assert spent["productive"] + spent["data_wait"] == pytest.approx(batches, rel=0.05)


def test_every_start_says_how_it_has_ended(directory: Path) -> None:
    with training(directory, launch=2, flags=FLAGS) as run:
        run.wait_for_batches(5)
        kill(run.named("trm worker 1"), signal.SIGSEGV)
        run.wait_for_start(2)
        run.wait_for_batches(5)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143

    first, second = starts_in(directory)

    assert second.cause == "worker 1: killed by SIGSEGV"
    assert second.reason == "SIGTERM"
    assert second.resumed_at == first.spans[-1].last
