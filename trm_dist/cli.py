"""The command line: parse, call, and turn errors into messages and exit codes.

Exit codes: 0 finished, 1 gave up, 2 the user must change something, 130 Ctrl+C, 143 preempted. What
needs torch is imported after parsing, so that a mistyped flag is answered at once.
"""

import difflib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import tyro

from trm_dist import __version__, logs
from trm_dist.checkpoint.names import LATEST, is_checkpoint_name, parse_epoch_name
from trm_dist.checkpoint.publish import position, read_summary
from trm_dist.checkpoint.store import Store, open_store, split_url
from trm_dist.config import Config
from trm_dist.elastic.agent import die_with_agent, end_agent
from trm_dist.elastic.preemption import StopListener, exit_code
from trm_dist.errors import CorruptCheckpointError, TrmDistError, UserError
from trm_dist.events import Emit, Event, Stopped
from trm_dist.progress import COUNTERS, Progress

if TYPE_CHECKING:
    from trm_dist.checkpoint.manager import CheckpointManager
    from trm_dist.elastic.world import Group
    from trm_dist.plan import Plan

Kind = TypeVar("Kind")

logger = logging.getLogger(__name__)

EXIT_GAVE_UP = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ListArguments:
    """List the checkpoints of a directory, or one file."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Directory or checkpoint file."""
    json: bool = False
    """Print one JSON document and nothing else."""


@dataclass(frozen=True, slots=True)
class InspectArguments:
    """Show what a checkpoint holds; of a directory, the newest one."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Directory or checkpoint file."""
    json: bool = False
    """Print one JSON document and nothing else."""
    digest: bool = False
    """Print nothing but the sha256 of weights, averaged weights and optimizer state."""


@dataclass(frozen=True, slots=True)
class VerifyArguments:
    """Check every byte of checkpoints: digest, CRCs, structure, counters, finite weights."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Directory or checkpoint file."""
    json: bool = False
    """Print one JSON document and nothing else."""


def main(arguments: Sequence[str], defaults: Config | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments: The command line without the program's name.
        defaults: Other defaults of `train` and `check`; the launch scripts have their own.

    Returns:
        The exit code; a run that started training ends the process itself.
    """
    rank = int(os.environ.get("RANK", "0"))
    logs.configure(rank=rank, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    die_with_agent(os.environ)
    try:
        return _dispatch(list(arguments), defaults or Config(), is_speaker=rank == 0)
    except _UsageError as error:
        _tell(str(error), is_speaker=rank == 0)
    except UserError as error:
        _tell(str(error), is_speaker=True)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except TrmDistError as error:
        _tell(str(error), is_speaker=True)
        return EXIT_GAVE_UP
    end_agent(os.environ)
    return EXIT_USAGE


class _UsageError(UserError):
    """Every worker sees the same wrong flags; one of them says so, if it is not said yet."""


def _dispatch(arguments: list[str], defaults: Config, *, is_speaker: bool) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": lambda rest: _train(*_parse_config("train", rest, defaults, is_speaker)),
        "check": lambda rest: _check(*_parse_config("check", rest, defaults, is_speaker)),
        "ls": lambda rest: _list(_parse("ls", ListArguments, rest, is_speaker)),
        "inspect": lambda rest: _inspect(_parse("inspect", InspectArguments, rest, is_speaker)),
        "verify": lambda rest: _verify(_parse("verify", VerifyArguments, rest, is_speaker)),
    }
    if not arguments or arguments[0] in {"-h", "--help"}:
        _print(f"usage: trm_dist {{{','.join(commands)}}} ...; each has --help")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        _print(__version__)
        return 0
    if arguments[0] not in commands:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f" Perhaps you meant {near[0]}." if near else ""
        raise _UsageError(
            f"{arguments[0]!r} is not a command.{hint} Commands: {', '.join(commands)}."
        )
    return commands[arguments[0]](arguments[1:])


# -- parsing ---------------------------------------------------------------------------------------


def _parse_config(
    command: str, arguments: list[str], defaults: Config, is_speaker: bool
) -> tuple[Config, frozenset[str]]:
    """Return the configuration and the names of the settings that were really given."""
    config = _parse(command, Config, arguments, is_speaker, default=defaults)
    return config, given_settings(arguments)


def given_settings(arguments: Sequence[str]) -> frozenset[str]:
    """Return the names of the settings for which a flag stands on a valid command line."""
    aliases = {"data": "dataset", "learning_rate": "lr"}
    flags = [each.split("=", 1)[0][2:] for each in arguments if each.startswith("--")]
    names = [each.replace("-", "_") for each in flags]
    flat = Config().flat()
    known = [aliases.get(name, name) for name in names]
    return frozenset(name if name in flat else name.removeprefix("no_") for name in known)


def _parse(
    command: str, kind: type[Kind], arguments: list[str], is_speaker: bool, **more: Any
) -> Kind:
    """Parse with tyro, which says itself what is wrong, with a suggestion."""
    try:
        parsed: Kind = tyro.cli(
            kind,
            args=arguments,
            prog=f"trm_dist {command}",
            console_outputs=is_speaker,
            config=(tyro.conf.OmitArgPrefixes,),
            **more,
        )
    except SystemExit as error:
        if error.code == 0:
            raise
        raise _UsageError("") from error
    return parsed


# -- training --------------------------------------------------------------------------------------


def _train(config: Config, given: frozenset[str]) -> int:
    from trm_dist.elastic.world import World, form_group, launch_id
    from trm_dist.observe.console import console
    from trm_dist.plan import check_space, make_plan
    from trm_dist.train import open_manager

    world = World.from_environment(os.environ)
    plan = manager = None
    emit: Emit = _hear_nothing
    if world.is_writer:
        plan = make_plan(config, given, launch_id(os.environ))
        log = plan.config.log
        emit = console(log.log_format, log_every_s=log.log_every_s)
        manager = open_manager(plan, emit)
        check_space(plan, open_store(plan.config.checkpoint.checkpoint_dir))
    group = form_group(world, os.environ)
    listener = StopListener(lambda signum: _stop(signum, manager, emit))
    listener.start()
    try:
        _run(plan, group, manager, emit)
    except Exception as error:  # noqa: BLE001 the border: whatever it was, the newest state is kept
        _give_up(error, manager, listener)
    _leave(0)


def _run(
    plan: "Plan | None", group: "Group", manager: "CheckpointManager | None", emit: Emit
) -> None:
    """Share the writer's plan, build the trainer, and train."""
    from trm_dist.plan import from_message, to_message
    from trm_dist.train import Trainer, pin_numerics

    message = group.broadcast(to_message(plan) if plan else b"")
    data = group.broadcast(plan.start.data if plan else b"")
    plan = plan or from_message(message, data)
    pin_numerics(plan.config.train.threads)
    trainer = Trainer(plan, group, manager, emit)
    del plan, data  # a checkpoint's bytes are not needed while training
    trainer.run()


def _stop(signum: int, manager: "CheckpointManager | None", emit: Emit) -> NoReturn:
    """End this worker for a signal: no collective, no agreement, the newest state saved."""
    if manager:
        manager.save_newest()
        at = manager.captured or Progress()
        emit(Stopped(progress=at, reason=signal.Signals(signum).name))
    _leave(exit_code(signum))


def _give_up(
    error: Exception, manager: "CheckpointManager | None", listener: StopListener
) -> NoReturn:
    """End this worker for an error: the newest state saved, one message or a traceback."""
    if listener.stopping.is_set():  # the others left first; the stop saves and ends this process
        threading.Event().wait()
    if isinstance(error, TrmDistError):
        _tell(str(error), is_speaker=True)
    else:
        logger.error("training failed", exc_info=error)
    if manager:
        manager.save_newest()
    if isinstance(error, UserError):
        end_agent(os.environ)
        _leave(EXIT_USAGE)
    _leave(EXIT_GAVE_UP)


def _leave(code: int) -> NoReturn:
    """End the process at once: tearing gloo and DDP down aborts in every second finished run."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hear_nothing(_event: Event) -> None:
    """Stand in for the listener in workers that do not speak."""


def _check(config: Config, given: frozenset[str]) -> int:
    from trm_dist.elastic.world import launch_id
    from trm_dist.plan import check_space, check_writable, estimate, make_plan

    plan = make_plan(config, given, launch_id(os.environ))
    store = open_store(plan.config.checkpoint.checkpoint_dir)
    check_writable(store)
    check_space(plan, store)
    sizes = estimate(plan)
    notes = ", ".join(f"{count} {name}" for name, count in plan.dataset.notes.items() if count)
    for name, setting in plan.settings.described().items():
        _print(f"{name} = {setting}")
    _print(f"data: {plan.dataset.num_samples} samples" + (f" ({notes})" if notes else ""))
    _print(f"batches: {plan.batches_per_epoch} an epoch, {plan.total_batches} in total")
    _print(
        f"model: {sizes['parameters']:,} parameters; a checkpoint has about "
        f"{sizes['checkpoint_bytes'] / 2**20:.1f} MiB, all that is kept "
        f"{sizes['kept_bytes'] / 2**20:.1f} MiB"
    )
    _print(f"start: {plan.start.source or 'fresh'}")
    _print("all checks passed")
    return 0


# -- looking at checkpoints ------------------------------------------------------------------------


def _list(arguments: ListArguments) -> int:
    store, names = _checkpoints_at(arguments.path)
    entries = {entry.name: entry for entry in store.entries()}
    rows: list[dict[str, Any]] = []
    for name in names:
        summary = read_summary(store, name) or {}
        rows.append({
            "name": name,
            **{key: summary.get(key) for key in ("epoch", "batch_idx", "batch_count", "branch")},
            "bytes": entries[name].size_bytes,
            "modified": entries[name].modified_s,
            "has_seal": bool(summary),
        })  # fmt: skip
    if arguments.json:
        _print(json.dumps(rows))
        return 0
    _print(
        f"{'name':40} {'epoch':>6} {'batch':>7} {'batches':>8} {'branch':>6} {'MiB':>9}  modified"
    )
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["modified"]))
        counters = (
            f"{row['epoch']:6} {row['batch_idx']:7} {row['batch_count']:8} {row['branch']:6}"
            if row["has_seal"]
            else f"{'damaged: no seal':>30}"
        )
        _print(f"{row['name']:40} {counters} {row['bytes'] / 2**20:9.2f}  {when}")
    return 0


def _inspect(arguments: InspectArguments) -> int:
    from trm_dist.checkpoint.state import digest, from_bytes

    store, names = _checkpoints_at(arguments.path)
    name = names[-1]
    try:
        state = from_bytes(store.read(name))
    except CorruptCheckpointError as error:
        _tell(f"{name} is damaged: {error}. `trm_dist verify` names the good ones.", True)
        return EXIT_GAVE_UP
    if arguments.digest:
        _print(digest(state))
        return 0
    plain = ("scheduler_state_dict", "rng_state", "config", "dataset", "world", "run")
    shown: dict[str, Any] = {"name": name, "digest": digest(state)}
    shown |= {key: state[key] for key in (*COUNTERS, "format_version", *plain)}
    shown["num_parameters"] = sum(
        each.numel() for each in state["ema_state_dict"]["weights"].values()
    )
    if arguments.json:
        _print(json.dumps(shown))
        return 0
    for key, value in shown.items():
        if isinstance(value, dict):
            _print(f"{key}:")
            for inner, each in value.items():
                _print(f"  {inner}: {each}")
        else:
            _print(f"{key}: {value}")
    return 0


def _verify(arguments: VerifyArguments) -> int:
    from trm_dist.checkpoint.state import find_damage

    store, names = _checkpoints_at(arguments.path)
    damage = {name: find_damage(store.read(name), name) for name in names}
    if arguments.json:
        _print(json.dumps([
            {"name": name, "is_good": not found, "damage": found} for name, found in damage.items()
        ]))  # fmt: skip
    else:
        for name, found in damage.items():
            _print(f"{name}: {'good' if not found else 'DAMAGED: ' + '; '.join(found)}")
    return EXIT_GAVE_UP if any(damage.values()) else 0


def _checkpoints_at(path: str) -> tuple[Store, list[str]]:
    """Return the store and the names meant by a directory or a file, oldest first.

    Raises:
        UserError: There is no checkpoint there.
    """
    store = open_store(path)
    names = [entry.name for entry in store.entries()] if not os.path.isfile(path) else []
    names = [name for name in names if is_checkpoint_name(name)]
    if not names:
        directory, name = split_url(path)
        store = open_store(directory)
        names = [entry.name for entry in store.entries() if entry.name == name]
    if not names or os.path.isdir(os.path.join(store.url, names[0])):
        raise UserError(f"{path} is not a checkpoint and holds none. Check the path.")
    summaries = {name: read_summary(store, name) for name in names}

    def age(name: str) -> tuple[Any, ...]:
        summary = summaries[name]
        place = position(summary) if summary else (0, 0)
        return (*place, parse_epoch_name(name) is None, name == LATEST)

    return store, sorted(names, key=age)


# -- speaking --------------------------------------------------------------------------------------


def _tell(message: str, is_speaker: bool) -> None:
    """Say what is wrong, on stderr."""
    if message and is_speaker:
        sys.stderr.write(f"trm_dist: {message}\n")
        sys.stderr.flush()


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
