"""The command line: parse, call, and turn errors into messages and exit codes.

Exit codes: 0 finished, 1 gave up, 2 the user must change something, 130 Ctrl+C, 143 preempted. What
needs torch is imported after parsing, so that a mistyped flag is answered at once.
"""

import difflib
import gc
import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import tyro

from trm_dist import __version__, logs
from trm_dist.config import Config
from trm_dist.elastic.agent import (
    die_with_agent,
    end_agent,
    is_under_launch,
    let_the_first_speak,
    record_error,
)
from trm_dist.elastic.capability import pin_capability
from trm_dist.errors import (
    EXIT_CRASHED,
    EXIT_GAVE_UP,
    EXIT_HOPELESS,
    EXIT_INTERRUPTED,
    EXIT_UNFIT,
    EXIT_USAGE,
    DeviceLostError,
    StoreAwayError,
    TrmDistError,
    UserError,
)
from trm_dist.launch.job import LaunchConfig, job_of
from trm_dist.logs import forget_reader, say, tell

Kind = TypeVar("Kind")


def main(arguments: Sequence[str], defaults: Config | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments: The command line without the program's name.
        defaults: Other defaults of `train` and `check`; the launch scripts have their own.

    Returns:
        The exit code; a run that started training ends the process itself.
    """
    return _guarded(lambda is_speaker: _dispatch(list(arguments), defaults or Config(), is_speaker))


def _guarded(command: Callable[[bool], int]) -> int:
    """Run a command, which is told whether it speaks for all workers, and return the exit code."""
    logs.open_streams()
    rank = int(os.environ.get("RANK", "0"))
    logs.configure(rank=rank, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    die_with_agent(os.environ)
    try:
        return command(rank == 0)
    except _UsageError as error:
        if rank == 0:
            tell(str(error))
        else:
            let_the_first_speak(os.environ)
    except UserError as error:
        tell(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (StoreAwayError, DeviceLostError) as error:
        record_error(error)
        return EXIT_UNFIT if isinstance(error, DeviceLostError) else EXIT_CRASHED
    except TrmDistError as error:
        tell(str(error))
        record_error(error)
        end_agent(os.environ)
        return EXIT_HOPELESS if is_under_launch(os.environ) else EXIT_GAVE_UP
    end_agent(os.environ)
    return EXIT_USAGE


class _UsageError(UserError):
    """Every worker sees the same wrong flags; one of them says so, if it is not said yet."""


def _dispatch(arguments: list[str], defaults: Config, is_speaker: bool) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": lambda rest: _train(*_parse_config("train", rest, defaults, is_speaker)),
        "launch": lambda rest: _launch(rest, defaults),
        "rendezvous": _rendezvous,
        "cache": _cache,
        "check": lambda rest: _check(*_parse_config("check", rest, defaults, is_speaker)),
        "ls": lambda rest: _look("ls", rest, is_speaker),
        "inspect": lambda rest: _look("inspect", rest, is_speaker),
        "verify": lambda rest: _look("verify", rest, is_speaker),
        "prune": lambda rest: _look("prune", rest, is_speaker),
        "predict": lambda rest: _predict(rest, is_speaker),
        "export": lambda rest: _export(rest, is_speaker),
        "report": lambda rest: _report(rest, is_speaker),
    }
    if arguments and arguments[0] in _INTERNAL:
        return _INTERNAL[arguments[0]](arguments[1:], defaults)
    if not arguments or arguments[0] in {"-h", "--help"}:
        say(f"usage: trm_dist {{{','.join(commands)}}} ...; each has --help")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        say(__version__)
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
    silence = nullcontext() if is_speaker else redirect_stderr(io.StringIO())
    flat_names = (tyro.conf.OmitArgPrefixes,)
    try:
        with silence:
            parsed: Kind = tyro.cli(
                kind, args=arguments, prog=f"trm_dist {command}", config=flat_names, **more
            )
    except SystemExit as error:
        if error.code == 0:
            raise
        raise _UsageError("") from error
    except BrokenPipeError:
        forget_reader()
        raise SystemExit(0) from None
    return parsed


# -- commands --------------------------------------------------------------------------------------


@contextmanager
def _importing() -> Iterator[None]:
    """Import what stays to the end: the garbage collector looks for nothing in it, now or later.

    Else it goes through all of torch again and again, for an eighth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(config: Config, given: frozenset[str]) -> int:
    pin_capability(config.train.cpu_capability, os.environ)
    with _importing():
        from trm_dist.worker import train
    train(config, given)


def _look(command: str, arguments: list[str], is_speaker: bool) -> int:
    from trm_dist import inspection

    kind, run = inspection.COMMANDS[command]
    return run(_parse(command, kind, arguments, is_speaker))


def _predict(arguments: list[str], is_speaker: bool) -> int:
    from trm_dist.predict import PredictArguments, predict

    return predict(_parse("predict", PredictArguments, arguments, is_speaker))


def _export(arguments: list[str], is_speaker: bool) -> int:
    from trm_dist.export import ExportArguments, export

    return export(_parse("export", ExportArguments, arguments, is_speaker))


def _report(arguments: list[str], is_speaker: bool) -> int:
    from trm_dist.report import ReportArguments, report

    return report(_parse("report", ReportArguments, arguments, is_speaker))


def _check(config: Config, given: frozenset[str]) -> int:
    pin_capability(config.train.cpu_capability, os.environ)
    from trm_dist.checkpoint.memory import SnapshotDir
    from trm_dist.checkpoint.resume import remembered
    from trm_dist.checkpoint.store import open_store
    from trm_dist.elastic.device import device_name, take_device
    from trm_dist.elastic.world import launch_id
    from trm_dist.plan import check_space, check_writable, estimate, make_plan

    take_device(config.train.device, config.train.backend, local_rank=0)
    checkpoint = config.checkpoint
    store = open_store(checkpoint.checkpoint_dir)
    memory = SnapshotDir(checkpoint.snapshot_dir, store.identity)
    plan = make_plan(config, given, launch_id(os.environ), remembered(memory.held()))
    check_writable(store)
    check_space(plan, store)
    sizes = estimate(plan)
    notes = ", ".join(f"{count} {name}" for name, count in plan.dataset.notes.items() if count)
    for name, setting in plan.settings.described().items():
        say(f"{name} = {setting}")
    say(f"data: {plan.dataset.num_samples} samples" + (f" ({notes})" if notes else ""))
    say(f"batches: {plan.batches_per_epoch} an epoch, {plan.total_batches} in total")
    say(
        f"model: {sizes['parameters']:,} parameters; a checkpoint has about "
        f"{sizes['checkpoint_bytes'] / 2**20:.1f} MiB, all that is kept "
        f"{sizes['kept_bytes'] / 2**20:.1f} MiB"
    )
    say(
        f"memory: {checkpoint.snapshot_slots} snapshots of {sizes['checkpoint_bytes'] / 2**20:.1f} "
        f"MiB a node in {checkpoint.snapshot_dir}, which has {memory.free_bytes() / 2**20:.1f} MiB "
        "free"
    )
    say(f"device: {device_name(config.train.device)}")
    say(f"start: {plan.start.source or 'fresh'}")
    say("all checks passed")
    return 0


@dataclass(frozen=True)
class _CacheArguments:
    """Encoded data that this node keeps."""

    cache_dir: str = ""
    """Its directory; empty: ~/.cache/trm_dist."""
    clear: bool = False
    """Remove all that nobody uses."""
    json: bool = False
    """Print one JSON document."""


def _cache(arguments: list[str]) -> int:
    from trm_dist.data.cache import default_directory, kept, remove

    parsed = _parse("cache", _CacheArguments, arguments, is_speaker=True)
    directory = parsed.cache_dir or default_directory()
    entries = []
    for each in kept(directory):
        is_removed = parsed.clear and remove(directory, each.name)
        entries.append(asdict(each) | {"removed": is_removed})
        if not parsed.json:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used_at))
            mark = " removed" if is_removed else ""
            say(f"{each.num_bytes / 2**20:10.1f} MiB  {used}  {each.url or '(incomplete)'}{mark}")
    if parsed.json:
        say(json.dumps({"directory": directory, "entries": entries}))
    else:
        say(f"{len(entries)} in {directory}")
    return 0


# -- launch and its processes ----------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchArguments:
    """Flags of `launch`: its own and those of `train`."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    config: Config = field(default_factory=Config)


@dataclass(frozen=True)
class RendezvousArguments:
    """Where the nodes of a run meet; a process for a machine that stays."""

    host: str = "0.0.0.0"  # noqa: S104 it is there to be reached
    """Address to listen on."""
    port: int = 29500
    """Port to listen on."""


def _launch(arguments: list[str], defaults: Config) -> int:
    from trm_dist.launch.supervisor import supervise

    parsed = _parse(
        "launch", LaunchArguments, arguments, is_speaker=True,
        default=LaunchArguments(config=defaults),
    )  # fmt: skip
    given = given_settings(arguments) & parsed.config.flat().keys()
    return supervise(job_of(parsed.launch, parsed.config, given, os.environ))


def _rendezvous(arguments: list[str]) -> int:
    parsed = _parse("rendezvous", RendezvousArguments, arguments, is_speaker=True)
    from trm_dist.launch.rendezvous import serve

    return serve(parsed.host, parsed.port)


def _zygote(arguments: list[str], defaults: Config) -> int:
    control, listener, pulse = map(int, arguments[:3])
    config, given = _parse_config("train", arguments[3:], defaults, is_speaker=True)
    with _importing():  # so its pages stay shared, too
        from trm_dist import worker
        from trm_dist.launch import membership, zygote
        from trm_dist.plan import preload_data

        if config.train.compile:
            from trm_dist.model.kernels import load_compiler

            with suppress(RuntimeError, OSError):  # of what is missing the worker tells
                load_compiler()
    preload_data(config)
    this = [sys.executable, "-m", "trm_dist"]
    zygote.Zygote(
        socket.socket(fileno=control), socket.socket(fileno=listener), pulse,
        worker=zygote.Program(
            "trm worker",
            lambda: _guarded(lambda _: worker.train(config, given)),
            [*this, "train", *arguments[3:]],
        ),
        agent=zygote.Program("trm agent", membership.main, [*this, "agent"]),
    ).run()  # fmt: skip


def _agent(arguments: list[str], _defaults: Config) -> int:
    from trm_dist.launch import membership

    return membership.main(json.loads(arguments[0]))


_INTERNAL = {"zygote": _zygote, "agent": _agent}
"""Commands that `launch` gives itself."""
