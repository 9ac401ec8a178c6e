"""The command line: parse, call, and turn errors into messages and exit codes.

Exit codes: 0 finished, 1 gave up, 2 the user must change something, 130 Ctrl+C, 143 preempted. What
needs torch is imported after parsing, so that a mistyped flag is answered at once.
"""

import difflib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from typing import Any, TypeVar

import tyro

from trm_dist import __version__, logs
from trm_dist.config import Config
from trm_dist.elastic.agent import die_with_agent, end_agent, let_the_first_speak
from trm_dist.elastic.capability import pin_capability
from trm_dist.errors import EXIT_GAVE_UP, EXIT_INTERRUPTED, EXIT_USAGE, TrmDistError, UserError
from trm_dist.logs import say, tell

Kind = TypeVar("Kind")


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
        if rank == 0:
            tell(str(error))
        else:
            let_the_first_speak(os.environ)
    except UserError as error:
        tell(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except TrmDistError as error:
        tell(str(error))
        return EXIT_GAVE_UP
    end_agent(os.environ)
    return EXIT_USAGE


class _UsageError(UserError):
    """Every worker sees the same wrong flags; one of them says so, if it is not said yet."""


def _dispatch(arguments: list[str], defaults: Config, *, is_speaker: bool) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": lambda rest: _train(*_parse_config("train", rest, defaults, is_speaker)),
        "check": lambda rest: _check(*_parse_config("check", rest, defaults, is_speaker)),
        "ls": lambda rest: _look("ls", rest, is_speaker),
        "inspect": lambda rest: _look("inspect", rest, is_speaker),
        "verify": lambda rest: _look("verify", rest, is_speaker),
        "prune": lambda rest: _look("prune", rest, is_speaker),
        "predict": lambda rest: _predict(rest, is_speaker),
    }
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
    return parsed


# -- commands --------------------------------------------------------------------------------------


def _train(config: Config, given: frozenset[str]) -> int:
    pin_capability(config.train.cpu_capability, os.environ)
    from trm_dist.worker import train

    train(config, given)


def _look(command: str, arguments: list[str], is_speaker: bool) -> int:
    from trm_dist import inspection

    kind, run = inspection.COMMANDS[command]
    return run(_parse(command, kind, arguments, is_speaker))


def _predict(arguments: list[str], is_speaker: bool) -> int:
    from trm_dist.predict import PredictArguments, predict

    return predict(_parse("predict", PredictArguments, arguments, is_speaker))


def _check(config: Config, given: frozenset[str]) -> int:
    pin_capability(config.train.cpu_capability, os.environ)
    from trm_dist.checkpoint.memory import SnapshotDir
    from trm_dist.checkpoint.resume import remembered
    from trm_dist.checkpoint.store import open_store
    from trm_dist.elastic.world import launch_id
    from trm_dist.plan import check_space, check_writable, estimate, make_plan

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
    say(f"start: {plan.start.source or 'fresh'}")
    say("all checks passed")
    return 0
