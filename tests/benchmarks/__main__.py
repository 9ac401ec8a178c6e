"""`make bench`: one table against every peer, as text, JSON, Markdown and a picture.

    python -m tests.benchmarks [--quick] [--only PART ...] [--output DIRECTORY]

Each part is a measurement of its own, in processes of its own, which takes its ways in turns. Its
rows are kept in the directory as soon as it is done; `--only` measures some parts again and makes
the table of these and of what is kept of the same size. Nothing else may compute meanwhile. The
exit code is 1 when a part could not be measured; the table says which.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.table import (
    SIZES,
    Row,
    draw,
    end_in_order,
    from_json,
    parser,
    table,
    to_json,
    verdict,
)
from trm_dist.observe.charts import duration

PEERS = ("tiny-recursive-model", "lightning", "torchdata", "datasets", "s3fs", "boto3")


@dataclass(frozen=True)
class Part:
    """A command that measures rows."""

    module: str
    arguments: tuple[str, ...] = ()
    workers: int = 0
    """Under torchrun; 0: the command sees to its own processes."""
    sizes: tuple[str, ...] = SIZES
    """In which it is measured."""

    def command(self, size: str, rows: Path) -> list[str]:
        """Return the command, which writes its rows into a file."""
        torchrun = [
            "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.workers}",
        ] if self.workers else []  # fmt: skip
        module = ["-m", f"tests.benchmarks.{self.module}", *self.arguments]
        return [sys.executable, *torchrun, *module, "--size", size, "--rows", str(rows)]


PARTS = {
    "step-1": Part("step"),
    "step-2": Part("step", workers=2),
    "order": Part("reduction", workers=2),
    "stop": Part("saving", ("stop",)),
    "saves-1": Part("saving", ("throughput",)),
    "saves-2": Part("saving", ("throughput",), workers=2),
    "restart": Part("recovery", ("time",)),
    "lost": Part("recovery", ("lost",)),
    "goodput": Part("recovery", ("goodput",), sizes=("full", "tiny")),
    "position": Part("position"),
    "restore": Part("loading", ("resume",), sizes=("full", "tiny")),
    "s3": Part("loading", ("s3",)),
    "data": Part("large_text"),
}


class Bench:
    """What was measured, in a directory."""

    def __init__(self, output: Path, size: str, parts: Mapping[str, Part] = PARTS) -> None:
        self._output, self._size, self._parts = output, size, parts
        self._rows = output / "rows" / size
        self.failed: list[str] = []

    def run(self, names: Sequence[str]) -> None:
        """Measure parts, one after the other; the files are renewed after each."""
        for name in names:
            (self._rows / f"{name}.json").unlink(missing_ok=True)
            began_s = time.monotonic()
            print(f"{name} ...", end=" ", flush=True)
            if not self._measure(name):
                self.failed.append(name)
                print("FAILED, ", end="")
            print(duration(time.monotonic() - began_s), flush=True)
            self._write()

    def forget(self) -> None:
        """Remove what is kept of this size, and the log."""
        shutil.rmtree(self._rows, ignore_errors=True)
        (self._output / "log.txt").unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """Return all rows that are kept, in the order of the parts."""
        files = [self._rows / f"{name}.json" for name in self._parts]
        return [row for each in files if each.exists() for row in from_json(each.read_text())]

    def text(self) -> str:
        """Return the table and what it comes to."""
        told = [f"Not measured, see log.txt: {', '.join(self.failed)}."] if self.failed else []
        return "\n\n".join([table(self.rows()), verdict(self.rows()), *told]) + "\n"

    def _measure(self, name: str) -> bool:
        self._rows.mkdir(parents=True, exist_ok=True)
        rows = self._rows / f"{name}.json"
        command = self._parts[name].command(self._size, rows)
        with (self._output / "log.txt").open("a") as log:
            print(f"\n== {' '.join(command)}", file=log, flush=True)
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                is_measured = process.wait() == 0 and rows.exists()
            except BaseException:  # Ctrl+C, SIGTERM: it ends what it has started
                process.terminate()
                process.wait()
                raise
        if not is_measured:
            rows.unlink(missing_ok=True)
        return is_measured

    def _write(self) -> None:
        rows, told = self.rows(), setting(self._size)
        title = f"trm_dist and others: {', '.join(f'{name} {told[name]}' for name in _TOLD)}"
        lines = [f"- {name}: {value}" for name, value in told.items()]
        text = "\n".join(["# Benchmark", "", *lines, "", "![](benchmark.svg)", "", self.text()])
        (self._output / "benchmark.md").write_text(text)
        (self._output / "benchmark.json").write_text(to_json(rows, told))
        (self._output / "benchmark.svg").write_text(draw(rows, title))


_TOLD = ("cores", "torch", "size")


def setting(size: str) -> dict[str, str]:
    """Return what is measured, and on what."""
    versions = {}
    for name in ("torch", *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    note = " (a smoke test: the numbers mean nothing)" if size == "tiny" else ""
    return {
        "size": size + note, "processor": _processor(), "cores": str(os.cpu_count()),
        "python": platform.python_version(), **versions,
    }  # fmt: skip


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    """Measure what is asked for; returns the exit code."""
    options = parser(__doc__, keeps_rows=False)
    options.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="that is, --size quick"
    )
    options.add_argument("--only", nargs="+", choices=PARTS, help="some parts", metavar="PART")
    options.add_argument("--output", default="build/bench", help="directory of what is written")
    asked = options.parse_args()
    end_in_order()
    output = Path(asked.output)
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(output, asked.size)
    if not asked.only:
        bench.forget()
    wanted = asked.only or [name for name, part in PARTS.items() if asked.size in part.sizes]
    began_s = time.monotonic()
    bench.run(wanted)
    print(f"\n{bench.text()}\n{output}/benchmark.md, .json, .svg")
    print(f"this took {duration(time.monotonic() - began_s)}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
