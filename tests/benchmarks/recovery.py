"""How long a run is down after `kill -9` of a worker, what it has lost, what kills cost.

    python -m tests.benchmarks.recovery time
    python -m tests.benchmarks.recovery compiled
    python -m tests.benchmarks.recovery lost
    python -m tests.benchmarks.recovery goodput
    ... --size full|quick|tiny

`time` compares trm_dist under `launch` and under plain torchrun with the pattern of the tutorials
and with Lightning under the same torchrun, in turns; the peers save after every batch, which is
their best here. `compiled` compares ours with and without --compile. `lost` counts finished
batches that are trained again after a kill of a worker, of all workers, and a SIGTERM, where
everybody saves every 20 batches. Peers get
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone: without either most of their restarts hang
with torch 2.13 and gloo. `goodput` kills a worker of a launched run every so often and tells
the share of its time that a run nobody disturbs needs for the same batches. Lightning takes part
where it is installed.
"""

import importlib.util
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.table import Goal, Row, end_in_order, parser, publish
from tests.elastic.harness import SNAPSHOTS, Training, kill, started

FLAGS = [
    "--dataset", "sudoku4:train?count=20000", "--batch-size", "10", "--shards", "2",
    "--dim", "16", "--n-sup", "2", "--h-cycles", "2", "--l-cycles", "1", "--epochs", "1000",
    "--log-format", "json", "--spot", "none",
]  # fmt: skip
LONGER = [
    "--dataset", "sudoku4:train?count=20000", "--batch-size", "64", "--shards", "2",
    "--dim", "128", "--n-sup", "4", "--h-cycles", "2", "--l-cycles", "2", "--epochs", "1000",
    "--log-format", "json", "--spot", "none",
]  # fmt: skip
LAUNCH = [sys.executable, "-m", "trm_dist", "launch", "--nproc-per-node=2"]
STEP_S = "0.02"
"""Of the peers: what a batch of ours takes at this size."""
EVERY = 20
"""Batches from save to save, where losses are counted."""


@dataclass(frozen=True)
class Plan:
    """How often, and how long."""

    rounds: int
    calm_batches: int
    """Of the undisturbed run, for what a batch takes."""
    goodput_s: float
    goodput_every_s: float


PLANS = {"full": Plan(5, 60, 600, 30), "quick": Plan(2, 60, 60, 10), "tiny": Plan(1, 3, 6, 3)}


# -- ways to train ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A training that is to be killed."""

    name: str
    command: Callable[[Path, int], list[str]]
    """Of a directory, and how many batches there are from save to save."""

    @property
    def is_launched(self) -> bool:
        return self.name == LAUNCHED

    @contextmanager
    def running(self, where: Path, every: int) -> Iterator[Training]:
        """Run it; whatever is left of it is ended afterwards."""
        is_peer = self.name not in {LAUNCHED, TORCHRUN}
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if is_peer else {}
        with started(where / "run", self.command(where, every), variables) as run:
            yield run

    def workers(self, run: Training) -> list[int]:
        """Return its living workers."""
        if self.is_launched:
            return [run.named(f"trm worker {rank}") for rank in range(2)]
        return [run.worker(rank) for rank in range(2)]


LAUNCHED, TORCHRUN = "trm_dist launch", "trm_dist, torchrun"
COMPILED = "trm_dist launch --compile"
TUTORIAL, LIGHTNING = "torchrun tutorial", "Lightning, torchrun"


def ways() -> dict[str, Way]:
    """Return the ways that can be had here, by their names."""
    found = [
        Way(LAUNCHED, launched),
        Way(TORCHRUN, lambda where, every: _torchrun("trm_dist", "train", *_flags(where, every))),
        Way(TUTORIAL, lambda where, every: _torchrun(
            "tests.benchmarks.tutorial", f"{where}/snapshot.pt", STEP_S, str(every))),
    ]  # fmt: skip
    if importlib.util.find_spec("lightning"):
        found.append(Way(LIGHTNING, lambda where, every: _torchrun(
            "tests.benchmarks.with_lightning", f"{where}/lightning", STEP_S, str(every)),
        ))  # fmt: skip
    else:
        print("Lightning is not installed here and takes no part.", file=sys.stderr)
    return {each.name: each for each in found}


def launched(where: Path, every: int) -> list[str]:
    """Return the command of two workers under `trm_dist launch`."""
    return [*LAUNCH, *_flags(where, every)]


def _torchrun(*module: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=1000", "-m", *module,
    ]  # fmt: skip


def _flags(where: Path, every: int) -> list[str]:
    own = {"--checkpoint-dir": f"{where}/checkpoints", "--snapshot-dir": SNAPSHOTS}
    interval = {"--checkpoint-interval": str(every)} if every > 1 else {}
    return [*FLAGS, *(part for pair in (own | interval).items() for part in pair)]


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory for a while."""
    where = Path(tempfile.mkdtemp(prefix="recovery-"))
    try:
        yield where
    finally:
        shutil.rmtree(where)


def in_turns(rounds: int, measure: Callable[[Way, int], dict[str, list[float]]]) -> dict[str, Any]:
    """Return what is measured by its name and that of the way, all ways in turns."""
    took: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name, way in ways().items():
            for what, values in measure(way, number).items():
                took.setdefault(what, {}).setdefault(name, []).extend(values)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return took


# -- time ------------------------------------------------------------------------------------------


def measure_time(plan: Plan) -> list[Row]:
    """Measure starts, and restarts after a worker was killed."""
    took = in_turns(plan.rounds, lambda way, _: restarts(way))
    rows = []
    for what, values in took.items():
        peers = {name: values[name] for name in (TUTORIAL, LIGHTNING) if name in values}
        is_all = what in {"start", "kill"}
        for name in (LAUNCHED, TORCHRUN) if is_all else (LAUNCHED,):
            goal = Goal(0.1, TUTORIAL) if (what, name) == ("kill", LAUNCHED) else None
            rows.append(Row(
                subject=_SUBJECTS.get(what, "kill -9 of a worker"),
                what=name if is_all else f"{name}, {what}", unit="s",
                better="less", ours=values[name], peers=peers,
                goal=Goal(1.0) if what == "start" else goal,
            ))  # fmt: skip
    return rows


_SUBJECTS = {
    "start": "start, command to first finished batch",
    "kill": "kill -9 of a worker to next finished batch",
}


def restarts(way: Way, victims: Sequence[int] = (1, 0, 1)) -> dict[str, list[float]]:
    """Return seconds of a start, and of restarts after workers were killed, in their phases."""
    found: dict[str, list[float]] = {}
    with directory() as where:
        began_s = time.time()
        with way.running(where, every=1) as run:
            run.wait_for_batches(1)
            found["start"] = [run.events("batch")[0]["time"] - began_s]
            for victim in victims:
                run.wait_for_batches(20)
                workers, starts, killed_s = way.workers(run), len(lives(run)), time.time()
                kill(workers[victim])
                _wait_for_restart(run, starts)
                for what, seconds in _phases(way, run, killed_s).items():
                    found.setdefault(what, []).append(seconds)
    return found


def _wait_for_restart(run: Training, starts: int) -> None:
    """Wait for the first batch after so many starts."""
    run.wait_for_start(starts + 1)
    run.wait_for(lambda: lives(run)[-1], "a batch")


def _phases(way: Way, run: Training, killed_s: float) -> dict[str, float]:
    at_s = run.events("started")[-1]["time"]
    done_s = lives(run)[-1][0]["time"]
    begun_s = max(map(_started_at, way.workers(run)))
    return {
        "kill": done_s - killed_s, "to new workers": begun_s - killed_s,
        "from there to the state": at_s - begun_s, "from there to the next batch": done_s - at_s,
    }  # fmt: skip


def _started_at(pid: int) -> float:
    """When a process has started, in seconds since the epoch, to 10 ms."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot_s + ticks / os.sysconf("SC_CLK_TCK")


def lives(run: Training) -> list[list[dict[str, Any]]]:
    """Return the batches that were told of, start by start."""
    found: list[list[dict[str, Any]]] = []
    for event in run.events():
        if event["event"] == "started":
            found.append([])
        elif event["event"] == "batch":
            found[-1].append(event)
    return found


def measure_compiled(plan: Plan) -> list[Row]:
    """Measure what --compile adds to a start and to a restart, with kernels that are kept."""

    def command(where: Path, every: int) -> list[str]:
        return [*launched(where, every), "--compile"]

    ways = {LAUNCHED: Way(LAUNCHED, launched), COMPILED: Way(LAUNCHED, command)}
    restarts(ways[COMPILED], victims=())  # compiles them
    took: dict[str, dict[str, list[float]]] = {"start": {}, "kill": {}}
    for _ in range(plan.rounds):
        for name, way in ways.items():
            found = restarts(way)
            for what, each in took.items():
                each.setdefault(name, []).extend(found[what])
    return [
        Row(
            subject=_SUBJECTS[what], what=COMPILED, unit="s", better="less",
            ours=values[COMPILED], peers={LAUNCHED: values[LAUNCHED]},
        )
        for what, values in took.items()
    ]  # fmt: skip


# -- losses ----------------------------------------------------------------------------------------


def measure_lost(plan: Plan) -> list[Row]:
    """Count finished batches that had to be trained again."""
    took = in_turns((plan.rounds + 1) // 2, _losses)  # a count, which needs fewer than a time
    return [
        Row(
            subject="finished batches lost", what=f"{what}, a save every {EVERY} batches",
            unit="batches", better="less", ours=values.pop(LAUNCHED),
            peers={name: each for name, each in values.items() if name != TORCHRUN},
            goal=Goal(0.0, beside=None),
        )
        for what, values in took.items()
    ]  # fmt: skip


def _losses(way: Way, number: int) -> dict[str, list[float]]:
    # Anywhere between two saves, at the same place for all.
    places = [random.Random(3 * number + each).randrange(EVERY) for each in range(3)]
    found: dict[str, list[float]] = {}
    with directory() as where:
        with way.running(where, EVERY) as run:
            for what, place, first in (
                ("SIGKILL of a worker", places[0], 1), ("SIGKILL of all workers", places[1], 0)
            ):  # fmt: skip
                _reach(run, place)
                workers, starts = way.workers(run), len(lives(run))
                for each in workers[first:]:
                    kill(each)
                _wait_for_restart(run, starts)
                found[what] = [_lost(lives(run)[-2], lives(run)[-1])]
            _reach(run, places[2])
            run.process.send_signal(signal.SIGTERM)
            run.end()
            before = lives(run)[-1]
        with way.running(where, EVERY) as run:
            run.wait_for_batches(1)
            found["SIGTERM"] = [_lost(before, lives(run)[-1])]
    return found


def _reach(run: Training, place: int) -> None:
    """Wait for a batch at some place between saves, two saves from here."""
    goal = run.told() // EVERY * EVERY + 2 * EVERY + place
    run.wait_for(lambda: run.told() >= goal, f"batch {goal}")


def _lost(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float:
    return float(before[-1]["batch_count"] + 1 - after[0]["batch_count"])


# -- goodput ---------------------------------------------------------------------------------------


def measure_goodput(plan: Plan) -> list[Row]:
    """Measure a run of which a worker is killed again and again."""
    way = Way(LAUNCHED, lambda where, _: [
        *LAUNCH, *LONGER, "--checkpoint-dir", f"{where}/run", "--snapshot-dir", SNAPSHOTS,
    ])  # fmt: skip
    with directory() as where, way.running(where, EVERY) as run:
        run.wait_for_batches(1 + plan.calm_batches)
        batch_s = statistics.median(each["seconds"] for each in run.events("batch")[1:])
    kills, rng = 0, random.Random(0)
    with directory() as where, way.running(where, EVERY) as run:
        run.wait_for_batches(1)
        began_s = run.events("batch")[-1]["time"]
        next_s = time.time() + plan.goodput_every_s
        while run.events("batch")[-1]["time"] < began_s + plan.goodput_s:
            run.wait_for_batches(1)
            if time.time() >= next_s:
                kills, next_s = kills + 1, next_s + plan.goodput_every_s
                kill(rng.choice(way.workers(run)))
        told = run.events("batch")[1:]
    took_s = told[-1]["time"] - began_s
    finished = {each["batch_count"] for each in told}
    print(
        f"{kills} kills in {took_s:.0f} s, one every {plan.goodput_every_s:.0f} s; batches of "
        f"{batch_s:.3f} s: {len(finished)} finished, {len(told) - len(finished)} of them twice"
    )
    return [Row(
        subject="goodput under kills", what=f"kill -9 of a worker every {plan.goodput_every_s:g} s",
        unit="share", better="more", ours=[len(finished) * batch_s / took_s],
        limit={"an undisturbed run": [1.0]},
    )]  # fmt: skip


if __name__ == "__main__":
    measures = {
        "time": measure_time, "compiled": measure_compiled, "lost": measure_lost,
        "goodput": measure_goodput,
    }  # fmt: skip
    options = parser(__doc__)
    options.add_argument("what", choices=measures)
    asked = options.parse_args()
    end_in_order()
    publish(measures[asked.what](PLANS[asked.size]), asked.rows)
