"""`make demo`: one run undisturbed, the same run under chaos, and both their digests.

Everything is real: torchrun, `trm_dist launch`, an S3 server, signals. What is shown at the end is
read from what the runs have left. Writes into the directory that it is given: the report of the
disturbed run, and a picture of both.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2

from tests.elastic.harness import SNAPSHOTS, Training, kill, training, wait_until_gone
from tests.s3.server import BUCKET, Server
from trm_dist.checkpoint.names import LATEST
from trm_dist.checkpoint.store import open_store
from trm_dist.observe.charts import HEIGHT, WIDTH, Chart, Column, chart, columns, y_range_of
from trm_dist.observe.charts import duration as in_words
from trm_dist.report import Story, page, table, tell_story

FLAGS = {
    "--dataset": "sudoku4:train?count=25600",
    "--eval-dataset": "sudoku4:test?count=500",
    "--eval-interval": "40",
    "--dim": "64",
    "--expansion": "2",
    "--h-cycles": "2",
    "--l-cycles": "2",
    "--n-sup": "3",
    "--batch-size": "128",
    "--shards": "2",
    "--epochs": "1",
    "--lr": "5e-3",
    "--warmup-steps": "50",
    "--checkpoint-interval": "20",
    "--latest-every-s": "5",
    "--grace-period": "10",
    "--snapshot-dir": SNAPSHOTS,
    "--log-format": "json",
}
OUTAGE_S = 4.0
PAUSE_S = 2.0
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Deed:
    """Something that was done to the run."""

    at: float
    batch_count: int
    text: str


class Chaos:
    """Does things to a run, and says so."""

    def __init__(self) -> None:
        self.deeds: list[Deed] = []
        self.losses: dict[int, set[str]] = {}

    def do(self, run: Training | None, text: str, deed: Callable[[], object]) -> None:
        """Do something, and keep a note of it."""
        at = run.told() if run else self.deeds[-1].batch_count
        self.deeds.append(Deed(time.time(), at, text))
        tell(f"  batch {at:3}: {text}")
        deed()

    def keep(self, run: Training) -> None:
        """Keep the losses of a run that is over."""
        for batch_count, found in run.losses().items():
            self.losses.setdefault(batch_count, set()).update(found)


def tell(text: str) -> None:
    """Tell whoever watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def reach(run: Training, batch_count: int) -> None:
    """Wait until the run has completed so many batches."""
    run.wait_for(lambda: run.told() >= batch_count, f"batch {batch_count}")


def undisturbed(work: Path) -> tuple[Training, str]:
    """Train without any disturbance."""
    directory = work / "undisturbed" / "run"
    directory.parent.mkdir()
    with training(directory, workers=2, base=FLAGS) as run:
        assert run.end() == 0, run.messages()
    return run, str(directory)


def disturbed(work: Path, server: Server, url: str, chaos: Chaos) -> Training:
    """Train the same, and do to it what machines do."""
    directory = work / "disturbed" / "run"
    directory.parent.mkdir()
    flags = {"--checkpoint-dir": url}
    variables = server.environment

    @contextmanager
    def start(what: str, **how: int) -> Iterator[Training]:
        tell(f"  started: {what}")
        with training(directory, base=FLAGS, flags=flags, variables=variables, **how) as run:
            yield run
            chaos.keep(run)

    with start("torchrun, 2 workers", workers=2, max_restarts=20) as run:
        reach(run, 25)
        chaos.do(run, "kill -9 of worker 1", lambda: kill(run.worker(1)))
        run.wait_for_start(2)
        reach(run, 45)
        chaos.do(run, f"the S3 server is killed, for {OUTAGE_S:.0f} s", server.kill)
        time.sleep(OUTAGE_S)
        chaos.do(run, "the S3 server is back", server.start)
        reach(run, 70)
        chaos.do(run, "kill -9 of torchrun", run.process.kill)
        wait_until_gone(run.processes())
    with start("trm_dist launch, 1 worker", launch=1) as run:
        reach(run, 90)
        chaos.do(run, "SIGTERM", lambda: run.process.send_signal(signal.SIGTERM))
        assert run.end() == 143, run.messages()
    chaos.do(None, f"{LATEST} is damaged", lambda: damage(url))
    time.sleep(PAUSE_S)
    with start("trm_dist launch, 3 workers", launch=3) as run:
        reach(run, 120)
        chaos.do(run, "kill -9 of worker 0", lambda: kill(run.named("trm worker 0")))
        run.wait_for_start(2)
        reach(run, 150)
        chaos.do(run, "kill -9 of the supervisor", run.process.kill)
        wait_until_gone(run.processes())
    with start("trm_dist launch, 2 workers", launch=2) as run:
        assert run.end() == 0, run.messages()
    return run


def damage(url: str) -> None:
    """Turn a bit in the middle of the newest checkpoint."""
    store = open_store(url)
    data = bytearray(store.read(LATEST))
    data[len(data) // 2] ^= 1
    store.put(LATEST, [data])


def draw(calm: Story, story: Story, run: Training, chaos: Chaos) -> str:
    """Draw both runs as one SVG."""
    longest_s = max(calm.account.total_s, story.account.total_s)
    begin = story.account.segments[0].since
    losses = {each["batch_count"]: each["loss"] for each in run.events("batch")}
    again = {count: float.fromhex(min(found)) for count, found in chaos.losses.items()}
    curves: Chart = chart(
        {"undisturbed": sorted(losses.items()), "disturbed": sorted(again.items())},
        x_end=max(losses), y_range=y_range_of(losses.values()),
    )  # fmt: skip
    lanes = [
        ("undisturbed", calm, _lane(calm, longest_s)),
        (f"disturbed {len(chaos.deeds)} times", story, _lane(story, longest_s)),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("demo.svg").render(
        lanes=lanes,
        deeds=[(each, (each.at - begin) / longest_s) for each in chaos.deeds],
        curves=curves,
        width=WIDTH,
        height=HEIGHT,
        in_words=in_words,
    )


def _lane(story: Story, longest_s: float) -> list[Column]:
    return columns(story.account.segments, max(1, round(240 * story.account.total_s / longest_s)))


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="build/demo", help="directory of what is written")
    output = Path(parser.parse_args().output)
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="trm_dist-demo-"))
    server = Server(work)
    try:
        server.start()
        os.environ.update(server.environment)
        return _show(work, server, output)
    finally:
        server.kill()
        shutil.rmtree(work, ignore_errors=True)


def _show(work: Path, server: Server, output: Path) -> int:
    began_s = time.monotonic()
    tell("1. A run that nobody disturbs (torchrun, 2 workers, checkpoints on local disk)")
    run, directory = undisturbed(work)
    calm = tell_story(directory, is_verifying=True)
    tell(f"  finished: digest {run.digest()}\n")

    tell("2. The same run, disturbed (checkpoints in S3)")
    chaos, url = Chaos(), f"s3://{BUCKET}/demo"
    last = disturbed(work, server, url, chaos)
    tell(f"  finished: digest {last.digest()}\n")

    story = tell_story(url, is_verifying=True)
    (output / "report.html").write_text(page(story))
    (output / "demo.svg").write_text(draw(calm, story, run, chaos))
    for line in table(story):
        tell(f"  {line}")
    differing = [each for each, found in run.losses().items() if chaos.losses.get(each) != found]
    is_same = run.digest() == last.digest() and not differing
    tell(f"\n3. undisturbed  {run.digest()}\n   disturbed    {last.digest()}")
    tell(
        f"   {'the same bits' if is_same else 'DIFFERENT BITS'}: weights, averages, optimizer, and "
        f"the losses of {len(run.losses()) - len(differing)} of {len(run.losses())} batches, "
        "those that were trained again among them"
    )
    tell(f"   report: {output}/report.html   picture: {output}/demo.svg")
    tell(f"   this took {in_words(time.monotonic() - began_s)}")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
