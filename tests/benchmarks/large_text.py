"""Time and memory of two workers that train on a large file of text.

    python -m tests.benchmarks.large_text [--size full|quick|tiny]
    ... [--gigabytes N] [--rounds N] [--kind jsonl|json] [--directory DIR] [--without-peers]

Writes a file of that size, starts a training on it, and ends it after some batches; then starts it
again, with what the first has kept. Memory is the largest resident one that a process ever had, as
the kernel counts it (VmHWM), mapped files included. All are started by torchrun, ours by
`trm_dist launch` as well. Beside it: each worker parses the file (`json`), and Hugging Face's
`datasets` where it is installed. The directory needs four times the room; all is removed at the
end.
"""

import importlib.util
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.recovery import LAUNCH
from tests.benchmarks.table import Goal, Row, end_in_order, parser, publish
from tests.elastic.harness import SMALL, Training, as_arguments, started

_BLOCK_RECORDS = 20_000
_WORDS = 'a of the kitten тренування відновлює стан 学习 données résumé {} \\ "said"'
_DEADLINE_S = 3 * 3600.0

_FLAGS = {
    "--seq-len": "256",
    "--batch-size": "32",
    "--shards": "2",
    "--checkpoint-interval": "1000000",
}
_OURS = {"": "ours", ", trm_dist launch": "ours, launched"}
"""What the rows of our ways end with."""


@dataclass(frozen=True)
class Plan:
    """How large the file is, how many batches are trained, and how often."""

    gigabytes: float
    batches: int
    rounds: int


PLANS = {
    "full": Plan(1.0, batches=50, rounds=3),
    "quick": Plan(0.1, batches=15, rounds=1),
    "tiny": Plan(0.001, batches=5, rounds=1),
}


def measure(plan: Plan, kind: str, parent: str | None, *, with_peers: bool) -> list[Row]:
    """Measure all ways, in turns."""
    directory = Path(tempfile.mkdtemp(prefix="trm_dist-large-", dir=parent))
    took: dict[str, dict[str, list[float]]] = {}
    try:
        data = directory / f"data.{kind}"
        write(data, int(plan.gigabytes * 1e9))
        size = f"{data.stat().st_size / 1e9:.2g} GB of {kind}, 2 workers"
        for number in range(plan.rounds):
            for name in [*_OURS.values(), *(_peers() if with_peers else ())]:
                for what, value in _starts(name, data, plan.batches).items():
                    took.setdefault(what, {}).setdefault(name, []).append(value)
            print(f"round {number + 1} of {plan.rounds}", file=sys.stderr)
    finally:
        shutil.rmtree(directory)
    return [
        Row(
            subject=f"data, {size}", what=what + how, unit="MiB" if "memory" in what else "s",
            better="less", ours=values[ours], goal=Goal(1.0),
            peers={name: each for name, each in values.items() if name not in _OURS.values()},
        )
        for what, values in took.items()
        for how, ours in _OURS.items()
    ]  # fmt: skip


def _peers() -> Iterator[str]:
    yield "json"
    if importlib.util.find_spec("datasets"):
        yield "datasets"
    else:
        print("Hugging Face's datasets is not installed and takes no part.", file=sys.stderr)


def _starts(name: str, data: Path, batches: int) -> dict[str, float]:
    """Return what a first start takes, and a second one."""
    with tempfile.TemporaryDirectory(dir=data.parent) as directory:
        cache = Path(directory) / "cache"
        found: dict[str, float] = {}
        for which in ("first start", "second start"):
            run = Path(directory) / which.replace(" ", "-") / "run"
            run.parent.mkdir()
            first_s, peak = _start(_command(name, data, cache, run), run, cache, batches)
            found[f"{which}, command to first batch"] = first_s
            found[f"{which}, memory of a process"] = peak / 2**20
        return found


def _command(name: str, data: Path, cache: Path, run: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if name not in _OURS.values():
        peers = ["-m", "tests.benchmarks.text_peers"]
        return [*torchrun, *peers, name, str(data), str(cache)]
    base = {flag: value for flag, value in SMALL.items() if "dataset" not in flag}
    own = {"--dataset": str(data), "--cache-dir": str(cache), "--checkpoint-dir": str(run)}
    flags = as_arguments(base | own | _FLAGS)
    under_torchrun = [*torchrun, "-m", "trm_dist", "train", *flags]
    return under_torchrun if name == _OURS[""] else [*LAUNCH, *flags]


def _start(command: list[str], run: Path, cache: Path, batches: int) -> tuple[float, int]:
    """Return the seconds to the first batch, and the largest peak in bytes after the last."""
    offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    began_s = time.time()
    with started(run, command, offline) as training:
        peaks = watch(training, batches)
        first_s = training.events("batch")[0]["time"] - began_s
        training.process.send_signal(signal.SIGTERM)
        training.process.wait(60)
    return first_s, max(peaks.values())


def write(path: Path, num_bytes: int) -> None:
    """Write records of about 1 kB of several scripts; after 20,000 they come again."""
    block = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records())
    is_list = path.suffix == ".json"
    raw = (block.replace("\n", ",\n") if is_list else block).encode()
    with path.open("wb") as file:
        file.write(b'{"data": [' if is_list else b"")
        for _ in range(max(1, num_bytes // len(raw))):
            file.write(raw)
        file.write(b'{"prompt": "last", "response": "last"}]}\n' if is_list else b"")


def records() -> Iterator[dict[str, str]]:
    chance = random.Random(0)
    words = _WORDS.split()
    for _ in range(_BLOCK_RECORDS):
        context, answer = (" ".join(chance.choices(words, k=chance.randint(1, 130))) for _ in "ab")
        yield {"context": context, "query": "Continue", "completion": answer}


def watch(run: Training, batches: int) -> dict[str, int]:
    """Return the peak of each process, in bytes, once some batches are done."""
    peaks: dict[str, int] = {}
    deadline_s = time.monotonic() + _DEADLINE_S
    while len(run.events("batch")) < batches:
        assert run.process.poll() is None, run.messages()
        assert time.monotonic() < deadline_s, run.messages()
        for pid in run.processes():
            peaks |= peak_of(pid)
        time.sleep(0.2)
    for pid in run.processes():
        peaks |= peak_of(pid)
    return peaks


def peak_of(pid: int) -> dict[str, int]:
    """Return the peak of a process under its id and command; nothing once it has ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return {f"{pid} {command[:90]}": peak[0]} if peak else {}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, help="instead of the size's own")
    options.add_argument("--rounds", type=int, help="instead of the size's own")
    options.add_argument("--kind", choices=["jsonl", "json"], default="jsonl")
    options.add_argument("--directory", help="of what is written; a temporary one otherwise")
    options.add_argument("--without-peers", action="store_true", help="ours alone")
    asked = options.parse_args()
    end_in_order()
    plan = PLANS[asked.size]
    plan = replace(
        plan, gigabytes=asked.gigabytes or plan.gigabytes, rounds=asked.rounds or plan.rounds
    )
    found = measure(plan, asked.kind, asked.directory, with_peers=not asked.without_peers)
    publish(found, asked.rows)
