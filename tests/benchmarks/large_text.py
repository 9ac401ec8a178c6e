"""Memory of workers that train on a large file of text: encoding and training, two workers.

    python -m tests.benchmarks.large_text GIGABYTES [jsonl | json] [DIRECTORY]

Writes a file of that size, starts a training on it, and ends it after some batches. Prints the
largest resident memory that each of its processes ever had, as the kernel counts it (VmHWM). The
directory needs twice the room, for the encoded data lie there too; all is removed at the end.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.elastic.harness import SMALL, Training, training

_BLOCK_RECORDS = 20_000
_WORDS = 'a of the kitten тренування відновлює стан 学习 données résumé {} \\ "said"'
_NUM_BATCHES = 50
_DEADLINE_S = 3 * 3600.0

_FLAGS = {
    "--seq-len": "256",
    "--batch-size": "32",
    "--shards": "2",
    "--checkpoint-interval": "1000000",
}


def main(gigabytes: float, kind: str, parent: str | None) -> None:
    directory = Path(tempfile.mkdtemp(prefix="trm_dist-large-", dir=parent))
    try:
        data = directory / f"data.{kind}"
        write(data, int(gigabytes * 1e9))
        print(f"{data.stat().st_size / 1e9:.2f} GB of {kind} written", flush=True)
        flags = {"--dataset": str(data), "--cache-dir": str(directory / "cache"), **_FLAGS}
        base = {name: value for name, value in SMALL.items() if "dataset" not in name}
        started_s = time.monotonic()
        with training(directory / "run", workers=2, base=base, flags=flags) as run:
            peaks = watch(run, started_s)
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)
        for command, peak in sorted(peaks.items(), key=lambda each: each[1]):
            print(f"{peak / 2**20:8.0f} MiB  {command}")
    finally:
        shutil.rmtree(directory)


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


def watch(run: Training, started_s: float) -> dict[str, int]:
    """Return the peak of each process, in bytes, once some batches are done."""
    peaks: dict[str, int] = {}
    first_s = 0.0
    while len(run.events("batch")) < _NUM_BATCHES:
        assert run.process.poll() is None, run.messages()
        assert time.monotonic() - started_s < _DEADLINE_S, run.messages()
        if not first_s and run.events("started"):
            first_s = time.monotonic() - started_s
            samples = run.events("started")[0]["num_samples"]
            print(f"{samples:,} samples; training began after {first_s:.0f} s", flush=True)
        for pid in run.processes():
            peaks |= peak_of(pid)
        time.sleep(0.2)
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
    asked = [*sys.argv[1:], *("", "jsonl", "")[len(sys.argv) - 1 :]]
    main(float(asked[0]), asked[1] or "jsonl", asked[2] or None)
