"""How long a run is down after `kill -9` of a worker, and what a run under kills comes to.

    python -m tests.benchmarks.recovery time [ROUNDS]
    python -m tests.benchmarks.recovery goodput [SECONDS [EVERY]]

`time` compares trm_dist under `launch` and under plain torchrun with the pattern of the tutorials
under the same torchrun, in turns. The latter gets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without
which most of its restarts fail with torch 2.13 and gloo. `goodput` kills a worker of a launched run
every so often and tells the share of its time that a run nobody disturbs needs for the same
batches.
"""

import json
import os
import queue
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1000",
]  # fmt: skip
LAUNCH = [sys.executable, "-m", "trm_dist", "launch", "--nproc-per-node=2"]


@dataclass
class Run:
    """A training and its events."""

    process: subprocess.Popen[str]
    started_s: float
    events: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)

    def listen(self) -> None:
        """Read events until the end."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.put(json.loads(line))

    def next(self, kind: str, after_s: float = 0.0) -> dict[str, Any]:
        """Return the next event of a kind that happened after a time."""
        while True:
            event = self.events.get(timeout=120)
            if event["event"] == kind and event["time"] > after_s:
                return event

    def workers(self) -> list[int]:
        """Its living workers."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                    name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
            except OSError:
                continue
            is_launched = "launch" in self.process.args
            is_child = int(rest.split()[1]) == self.process.pid
            if name.startswith("trm worker") if is_launched else is_child:
                found.append(pid)
        return sorted(found)


def _started_at(pid: int) -> float:
    """When a process has started, in seconds since the epoch, to 10 ms."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot_s + ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(command: list[str]) -> Iterator[Run]:
    """Run a training; it is ended afterwards."""
    variables = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if "trm_dist" in command:
        variables.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    started_s = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
    )
    run = Run(process, started_s)
    threading.Thread(target=run.listen, daemon=True).start()
    try:
        yield run
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def measure(rounds: int) -> None:
    """Print the medians of each phase."""
    variants = {
        "tutorial, torchrun": lambda where: [
            *TORCHRUN, "-m", "tests.benchmarks.tutorial", f"{where}/snapshot.pt", "0.02",
        ],
        "trm_dist, torchrun": lambda where: [
            *TORCHRUN, "-m", "trm_dist", "train", *FLAGS, "--checkpoint-dir", f"{where}/run",
        ],
        "trm_dist launch": lambda where: [*LAUNCH, *FLAGS, "--checkpoint-dir", f"{where}/run"],
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, command in variants.items():
            where = tempfile.mkdtemp(prefix="recovery-")
            with running(command(where)) as run:
                cold_s = run.next("batch")["time"] - run.started_s
                for victim in (-1, 0, -1):
                    for _ in range(20):
                        run.next("batch")
                    killed_s = time.time()
                    os.kill(run.workers()[victim], signal.SIGKILL)
                    started = run.next("started", killed_s)["time"]
                    done = run.next("batch", started)["time"]
                    begun = max(map(_started_at, run.workers()))
                    found[name].append({
                        "cold start": cold_s, "to new workers": begun - killed_s,
                        "to the state": started - begun, "to the next batch": done - started,
                        "in all": done - killed_s,
                    })  # fmt: skip
            shutil.rmtree(where)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    _print_table(found)


def _print_table(found: dict[str, list[dict[str, float]]]) -> None:
    columns = list(found["trm_dist launch"][0])
    print("| seconds, median (least-greatest) | " + " | ".join(columns) + " | ratio |")
    print("|---" * (len(columns) + 2) + "|")
    base = statistics.median(each["in all"] for each in found["tutorial, torchrun"])
    for name, rows in found.items():
        cells = []
        for column in columns:
            values = [each[column] for each in rows]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        ratio = statistics.median(each["in all"] for each in rows) / base
        print(f"| {name} | " + " | ".join(cells) + f" | {ratio:.3f} |")


def goodput(seconds: float, every_s: float) -> None:
    """Print the goodput of a run of which a worker is killed again and again."""
    where = tempfile.mkdtemp(prefix="goodput-")
    with running([*LAUNCH, *LONGER, "--checkpoint-dir", f"{where}/calm"]) as run:
        run.next("batch")
        times = [run.next("batch")["seconds"] for _ in range(60)]
    batch_s = statistics.median(times)
    batches: dict[int, int] = {}
    kills, rng = 0, random.Random(0)
    with running([*LAUNCH, *LONGER, "--checkpoint-dir", f"{where}/killed"]) as run:
        first = run.next("batch")
        began_s, next_s = first["time"], time.time() + every_s
        while time.time() < began_s + seconds:
            event = run.next("batch")
            batches[event["batch_count"]] = batches.get(event["batch_count"], 0) + 1
            if time.time() >= next_s:
                kills, next_s = kills + 1, next_s + every_s
                os.kill(rng.choice(run.workers()), signal.SIGKILL)
        took_s = event["time"] - began_s
    shutil.rmtree(where)
    lost = sum(count - 1 for count in batches.values())
    print(
        f"{kills} kills in {took_s:.0f} s, one every {every_s:.0f} s; batches of {batch_s:.3f} s: "
        f"{len(batches)} finished, {lost} of them twice; goodput "
        f"{len(batches) * batch_s / took_s:.3f}"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["time", *rest]:
            measure(int(rest[0]) if rest else 5)
        case ["goodput", *rest]:
            numbers = [float(each) for each in rest]
            goodput(*(numbers + [600.0, 30.0][len(numbers) :]))
        case _:
            sys.exit(__doc__)
