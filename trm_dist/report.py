"""`trm_dist report`: what became of a run, for people who were not there.

Everything is read from next to the checkpoints: the ledgers of all its starts, the record of the
run, the checkpoints themselves. The page is one file without a script and without a request.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from trm_dist import __version__
from trm_dist.checkpoint.catalog import find_checkpoints
from trm_dist.checkpoint.journal import read_journals
from trm_dist.checkpoint.names import parse_epoch_name
from trm_dist.checkpoint.runs import Run, read_run
from trm_dist.checkpoint.store import Store, open_store, split_url
from trm_dist.errors import UserError
from trm_dist.logs import say
from trm_dist.observe.charts import Chart, chart, columns, duration, number, y_range_of
from trm_dist.observe.goodput import Account, Span, Start, account, parse
from trm_dist.observe.ledger import FINISHED, Spent

_STOPS = {
    "SIGTERM": "was told to stop (SIGTERM)",
    "SIGINT": "was told to stop (Ctrl+C)",
    "SIGUSR1": "was told to stop (SIGUSR1)",
}
_LOST = "another worker was lost"
_RESTARTED = "was stopped by torchrun: another worker had failed, or nodes came or went"
_KILLED = "was killed and could leave no word: SIGKILL, out of memory, or its node is gone"
_SILENT_S = 300.0
"""A run that has not ended and shows no sign of life for so long has stopped."""
_COLUMNS = 120

EXPLAINED = {
    Spent.PRODUCTIVE: "training of batches that are part of the newest state",
    Spent.STARTUP: "starting processes, imports, planning, opening the data",
    Spent.RENDEZVOUS: "waiting for all workers to meet",
    Spent.RESTORE: "reading the newest state, building the model, giving it to all workers",
    Spent.DATA_WAIT: "waiting for the samples of a batch",
    Spent.SAVE_STALL: "training stood still for a copy of the state or for the store",
    Spent.EVALUATION: "evaluating the averaged weights",
    Spent.LOST_WORK: "an unfinished batch at a kill, batches that were trained again",
    Spent.DOWN: "nobody was there",
}


@dataclass(frozen=True, slots=True)
class ReportArguments:
    """Tell what became of a run: where its time went, its curves, starts and checkpoints."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Directory of its checkpoints."""
    output: str = "report.html"
    """File or URL of the page; "none": no page."""
    verify: bool = True
    """Check every byte of the checkpoints."""
    json: bool = False
    """Print one JSON document and nothing else."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A row of the table of checkpoints."""

    name: str
    batch_count: int | None
    num_bytes: int
    modified_s: float
    """Seconds since the epoch."""
    damage: list[str] | None
    """None: it was not checked."""


@dataclass(frozen=True, slots=True)
class Story:
    """What is known of a run."""

    url: str
    run: Run
    starts: Sequence[Start]
    account: Account
    checkpoints: Sequence[Checkpoint]
    told_at: float
    """Seconds since the epoch."""

    @property
    def training(self) -> dict[str, Any]:
        """What the newest start said that has come to train."""
        return next((dict(each.training) for each in reversed(self.starts) if each.training), {})

    @property
    def digest(self) -> str:
        """Of the final state; empty as long as there is none."""
        return self.starts[-1].digest if self.starts else ""

    @property
    def batch_count(self) -> int:
        """Batches in the newest state."""
        newest = next((each for each in reversed(self.starts) if each.training), None)
        return newest.spans[-1].last if newest and newest.spans else 0

    @property
    def interruptions(self) -> int:
        """How often training was interrupted; a run that has finished and goes on was not."""
        training = [each for each in self.starts if each.training]
        return sum(each.reason != FINISHED for each in training[:-1])

    @property
    def state(self) -> str:
        """How it stands, in words."""
        last = self.starts[-1]
        if last.reason == FINISHED:
            return "finished"
        if last.reason:
            return "stopped"
        return "running" if self.told_at - last.last_at < _SILENT_S else "silent"

    def ending(self, index: int) -> str:
        """Say how a start has ended; empty: it goes on."""
        start = self.starts[index]
        has_next = index + 1 < len(self.starts)
        cause = self.starts[index + 1].cause if has_next else ""
        if start.reason in _STOPS and has_next and _is_same_launch(start, self.starts[index + 1]):
            return cause or _RESTARTED
        if start.reason and start.reason != _LOST:
            return _STOPS.get(start.reason, start.reason)
        if cause or start.reason:
            return cause or start.reason
        return _KILLED if has_next or self.state == "silent" else ""


def _is_same_launch(start: Start, later: Start) -> bool:
    """Tell whether two starts have the same launcher; its start is known to a hundredth."""
    return start.host == later.host and abs(start.launched_at - later.launched_at) < 0.5


def report(arguments: ReportArguments) -> int:
    """Print the table, and write the page."""
    story = tell_story(arguments.path, is_verifying=arguments.verify)
    if arguments.output != "none":
        _write_page(arguments.output, story)
    if arguments.json:
        say(json.dumps(as_json(story)))
        return 0
    for line in table(story):
        say(line)
    if arguments.output != "none":
        say(f"page written to {arguments.output}")
    return 0


def tell_story(url: str, *, is_verifying: bool) -> Story:
    """Read what there is of a run.

    Raises:
        UserError: There is no ledger.
    """
    store = open_store(url)
    try:
        starts = [each for each in map(parse, read_journals(store)) if each]
        run = read_run(store) or Run.rebuilt(
            each.seal.summary for each in find_checkpoints(store) if each.seal
        )
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error}. Check the path.") from error
    if run is not None:
        ours = {"", run.run_id}  # one that was replaced by --overwrite is another run
        starts = [each for each in starts if each.training.get("run_id", "") in ours]
    if run is None or not any(each.training for each in starts):
        raise UserError(
            f"{url} holds no ledger of a run. Give the --checkpoint-dir of a training that has "
            "saved at least once."
        )
    while not starts[0].training and starts[0].last_at < run.created_at:
        starts = starts[1:]  # of the run before
    while len(starts) > 1 and starts[-2].reason == FINISHED and not _has_trained(starts[-1]):
        starts = starts[:-1]  # it has only seen that all is done
    try:
        checkpoints = list(_checkpoints(store, is_verifying=is_verifying))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error}. Check the path.") from error
    return Story(store.url, run, starts, account(starts), checkpoints, time.time())


def _has_trained(start: Start) -> bool:
    return any(each.last > each.first for each in start.spans)


def _checkpoints(store: Store, *, is_verifying: bool) -> Iterable[Checkpoint]:
    from trm_dist.checkpoint.state import find_damage

    entries = {each.name: each for each in store.entries()}
    found = [each for each in find_checkpoints(store) if each.name in entries]

    def age(each: Any) -> tuple[int, bool]:
        count = int(each.seal.summary["batch_count"]) if each.seal else 0
        return count, parse_epoch_name(each.name) is None

    for each in sorted(found, key=age):
        entry = entries[each.name]
        damage = None
        if is_verifying:
            try:
                damage = find_damage(store.view(each.name), each.name)
            except FileNotFoundError:  # a run that goes on may let it go meanwhile
                continue
        yield Checkpoint(
            name=each.name,
            batch_count=int(each.seal.summary["batch_count"]) if each.seal else None,
            num_bytes=entry.size_bytes,
            modified_s=entry.modified_s,
            damage=damage,
        )


# -- for scripts and terminals ---------------------------------------------------------------------


def as_json(story: Story) -> dict[str, Any]:
    """Return the story as plain values."""
    return {
        "url": story.url,
        "run_id": story.run.run_id,
        "branch": story.run.branch,
        "state": story.state,
        "digest": story.digest,
        "batch_count": story.batch_count,
        "total_batches": story.training["total_batches"],
        "wall_seconds": story.account.total_s,
        "goodput": story.account.goodput,
        "seconds": dict(story.account.seconds),
        "starts": [
            {
                "started_at": each.started_at,
                "host": each.host,
                "world_size": each.training.get("world_size"),
                "resumed_at": each.resumed_at,
                "batch_count": each.spans[-1].last if each.spans else None,
                "seconds": each.last_at - each.started_at,
                "ending": story.ending(index),
            }
            for index, each in enumerate(story.starts)
        ],
        "checkpoints": [
            asdict(each) | {"is_good": None if each.damage is None else not each.damage}
            for each in story.checkpoints
        ],
    }


def table(story: Story) -> Iterable[str]:
    """Yield what a person reads on a terminal."""
    found = story.account
    yield summary(story)
    yield ""
    yield f"{'time spent on':14} {'time':>14} {'share':>7}"
    for spent in Spent:
        share = found.seconds[spent] / found.total_s if found.total_s else 0.0
        yield f"{_words(spent):14} {duration(found.seconds[spent]):>14} {share:7.1%}"
    yield f"{'in all':14} {duration(found.total_s):>14} {1:7.1%}"
    yield ""
    yield f"{'start':>5} {'at':19} {'workers':>7} {'batches':>17}  how it has ended"
    for index, each in enumerate(story.starts):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.started_at))
        batches = f"{each.resumed_at} to {each.spans[-1].last}" if each.training else "none"
        workers = each.training.get("world_size", "")
        yield f"{index + 1:5} {when} {workers:>7} {batches:>17}  {story.ending(index)}"
    bad = [each.name for each in story.checkpoints if each.damage]
    checked = "" if all(each.damage is not None for each in story.checkpoints) else ", not checked"
    yield ""
    yield f"{len(story.checkpoints)} checkpoints{checked}" + (
        f", DAMAGED: {', '.join(bad)}" if bad else ""
    )
    if story.digest:
        yield f"digest {story.digest}"


def summary(story: Story) -> str:
    """Return the run in one sentence or two."""
    again = story.interruptions
    goodput, lost = story.account.goodput, story.account.seconds[Spent.LOST_WORK]
    interrupted = {0: "It was never interrupted", 1: "It was interrupted once"}.get(
        again, f"It was interrupted {again} times"
    )
    return (
        f"{_STATES[story.state]} after batch {story.batch_count:,} of "
        f"{story.training['total_batches']:,}. {interrupted}; of {duration(story.account.total_s)} "
        f"it has trained {goodput:.1%}, and {duration(lost)} of work had to be done again."
    )


_STATES = {
    "finished": "The run has finished",
    "running": "The run goes on",
    "stopped": "The run was stopped",
    "silent": "The run has shown no sign of life lately; its last one was",
}


def _words(spent: str) -> str:
    return spent.replace("_", " ")


# -- the page --------------------------------------------------------------------------------------


def page(story: Story) -> str:
    """Return the report as one HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trm_dist.observe", "templates"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "number": number, "words": _words, "when": _when}
    return environment.get_template("report.html").render(
        story=story,
        summary=summary(story),
        version=__version__,
        explained=EXPLAINED,
        spent=list(Spent),
        loss=_loss(story),
        accuracy=_accuracy(story),
        columns=columns(story.account.segments, _COLUMNS),
        column_s=story.account.total_s / _COLUMNS,
        marks=_marks(story),
        named=[each for each in story.checkpoints if parse_epoch_name(each.name)],
        x_end=_x_end(story),
    )


def _x_end(story: Story) -> int:
    return max(1, int(story.training["total_batches"]), story.batch_count)


def _newest(story: Story) -> list[Span]:
    """Return the lines of the run's present: without the work that was lost."""
    kept: list[Span] = []
    for start in story.starts:
        if start.resumed_at is not None:
            kept = [each for each in kept if each.last <= start.resumed_at]
            kept += [each for each in start.spans if each.last > each.first]
    return kept


def _loss(story: Story) -> Chart:
    points = [(float(each.last), each.loss) for each in _newest(story) if each.loss is not None]
    y_range = y_range_of(loss for _, loss in points)
    return chart({"loss": points}, x_end=_x_end(story), y_range=y_range)


def _accuracy(story: Story) -> Chart:
    kept = _newest(story)
    series: dict[str, list[tuple[float, float]]] = {
        "token accuracy": [
            (each.last, each.token_accuracy) for each in kept if each.token_accuracy is not None
        ],
        "exact accuracy": [
            (each.last, each.exact_accuracy) for each in kept if each.exact_accuracy is not None
        ],
    }
    evaluations = [each.evaluation for start in story.starts for each in start.spans]
    told = {each["batch_count"]: each["exact_accuracy"] for each in evaluations if each}
    series["exact accuracy on the evaluation set"] = sorted(told.items())
    return chart(series, x_end=_x_end(story), y_range=(0.0, 1.0))


def _marks(story: Story) -> list[dict[str, Any]]:
    """Return where starts have gone on, and why."""
    marks: list[dict[str, Any]] = []
    world_size = None
    for index, start in enumerate(story.starts):
        if not start.training:
            continue
        found, world_size = world_size, start.training["world_size"]
        if found is None:
            continue
        ending = story.ending(_before(story, index))
        kind = "stop" if ending in _STOPS.values() else "failure"
        resized = f"; {found} workers became {world_size}" if found != world_size else ""
        marks.append({
            "batch_count": start.resumed_at, "kind": kind, "is_resized": found != world_size,
            "text": f"start {index + 1} from batch {start.resumed_at}: {ending}{resized}",
        })  # fmt: skip
    return marks


def _before(story: Story, index: int) -> int:
    """Return the start before one that has come to train."""
    return max(each for each in range(index) if story.starts[each].training)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _write_page(url: str, story: Story) -> None:
    content = page(story).encode()
    try:
        if "://" in url:
            directory, name = split_url(url)
            open_store(directory).put(name, [content])
        else:  # a store leaves a folder of its own beside
            with open(url, "wb") as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"--output {url} cannot be written: {error}. Choose another.") from error
