"""Checkpoints for people and for scripts: list, inspect, verify."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import tyro

from trm_dist.checkpoint.catalog import find_checkpoints, position, read_summary
from trm_dist.checkpoint.names import LATEST, is_checkpoint_name, parse_epoch_name
from trm_dist.checkpoint.runs import Run, read_run
from trm_dist.checkpoint.state import digest, find_damage, from_bytes
from trm_dist.checkpoint.store import Store, open_store, split_url
from trm_dist.checkpoint.writer import prunable
from trm_dist.errors import EXIT_GAVE_UP, CorruptCheckpointError, UserError
from trm_dist.logs import say, tell
from trm_dist.progress import COUNTERS


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


def list_checkpoints(arguments: ListArguments) -> int:
    """Print a line each, oldest first."""
    store, names = checkpoints_at(arguments.path)
    entries = {entry.name: entry for entry in store.entries()}
    rows: list[dict[str, Any]] = []
    for name in [each for each in names if each in entries]:
        summary = read_summary(store, name) or {}
        rows.append({
            "name": name,
            **{key: summary.get(key) for key in ("epoch", "batch_idx", "batch_count", "branch")},
            "bytes": entries[name].size_bytes,
            "modified": entries[name].modified_s,
            "has_seal": bool(summary),
        })  # fmt: skip
    if arguments.json:
        say(json.dumps(rows))
        return 0
    say(f"{'name':40} {'epoch':>6} {'batch':>7} {'batches':>8} {'branch':>6} {'MiB':>9}  modified")
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["modified"]))
        counters = (
            f"{row['epoch']:6} {row['batch_idx']:7} {row['batch_count']:8} {row['branch']:6}"
            if row["has_seal"]
            else f"{'damaged: no seal':>30}"
        )
        say(f"{row['name']:40} {counters} {row['bytes'] / 2**20:9.2f}  {when}")
    return 0


def inspect_checkpoint(arguments: InspectArguments) -> int:
    """Print one checkpoint; exit code 1 when it is damaged."""
    store, names = checkpoints_at(arguments.path)
    name = names[-1]
    try:
        state = from_bytes(store.view(name))
    except CorruptCheckpointError as error:
        tell(f"{name} is damaged: {error}. `trm_dist verify` names the good ones.")
        return EXIT_GAVE_UP
    if arguments.digest:
        say(digest(state))
        return 0
    plain = ("scheduler_state_dict", "rng_state", "config", "dataset", "world", "run")
    shown: dict[str, Any] = {"name": name, "digest": digest(state)}
    shown |= {key: state[key] for key in (*COUNTERS, "format_version", *plain)}
    shown["num_parameters"] = sum(
        each.numel() for each in state["ema_state_dict"]["weights"].values()
    )
    if arguments.json:
        say(json.dumps(shown))
        return 0
    for key, value in shown.items():
        if isinstance(value, dict):
            say(f"{key}:")
            for inner, each in value.items():
                say(f"  {inner}: {each}")
        else:
            say(f"{key}: {value}")
    return 0


def verify_checkpoints(arguments: VerifyArguments) -> int:
    """Print what is good and what is not; exit code 1 when anything is not."""
    store, names = checkpoints_at(arguments.path)
    damage = {}
    for name in names:
        with suppress(FileNotFoundError):  # a run that goes on may let it go meanwhile
            damage[name] = find_damage(store.view(name), name)
    if arguments.json:
        say(json.dumps([
            {"name": name, "is_good": not found, "damage": found} for name, found in damage.items()
        ]))  # fmt: skip
    else:
        for name, found in damage.items():
            say(f"{name}: {'good' if not found else 'DAMAGED: ' + '; '.join(found)}")
    return EXIT_GAVE_UP if any(damage.values()) else 0


@dataclass(frozen=True, slots=True)
class PruneArguments:
    """Remove checkpoints of the current branch that are no longer needed.

    checkpoint_latest.pt, checkpoint_final.pt and the newest good ones always stay.
    """

    path: tyro.conf.Positional[str] = "checkpoints"
    """Directory of checkpoints."""
    keep_last: int = 0
    """Newest checkpoints with a name of their own to keep; 0: all."""
    keep_every: int = 0
    """Keep also each checkpoint whose batch count is a multiple of this; 0: none."""
    multipart: bool = False
    """Remove unfinished uploads that writers which died have left. Not while a run is writing."""
    dry_run: bool = False
    """Only tell what would be removed."""
    json: bool = False
    """Print one JSON document and nothing else."""


def prune_checkpoints(arguments: PruneArguments) -> int:
    """Remove what may go, and say what it was."""
    if arguments.keep_last < 0 or arguments.keep_every < 0:
        raise UserError("--keep-last and --keep-every must not be negative.")
    if not arguments.keep_last and not arguments.multipart:
        raise UserError(
            "prune: say what may go: --keep-last N (all but the newest N), --multipart, or both."
        )
    store = open_store(arguments.path)
    try:
        removed = _prune(store, arguments)
        uploads = _abort_uploads(store, arguments) if arguments.multipart else []
    except OSError as error:
        raise UserError(f"{arguments.path} cannot be pruned: {error}. Check the path.") from error
    if arguments.json:
        say(json.dumps({"removed": removed, "uploads": uploads, "dry_run": arguments.dry_run}))
        return 0
    verb = "would remove" if arguments.dry_run else "removed"
    for name in [*removed, *(f"unfinished write of {each}" for each in uploads)]:
        say(f"{verb} {name}")
    if not removed and not uploads:
        say("nothing to remove")
    return 0


def _prune(store: Store, arguments: PruneArguments) -> list[str]:
    if not arguments.keep_last:
        return []
    run = read_run(store) or Run.rebuilt(
        each.seal.summary for each in find_checkpoints(store) if each.seal
    )
    if run is None:
        raise UserError(f"{store.url} holds no checkpoint. Check the path.")
    names = prunable(
        store, run, keep_last=arguments.keep_last, keep_every=arguments.keep_every, known_good=set()
    )
    for name in names:
        if not arguments.dry_run:
            store.delete(name)
    return names


def _abort_uploads(store: Store, arguments: PruneArguments) -> list[str]:
    names = store.leftovers()
    if not arguments.dry_run:
        store.remove_leftovers()
    return names


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "ls": (ListArguments, list_checkpoints),
    "inspect": (InspectArguments, inspect_checkpoint),
    "verify": (VerifyArguments, verify_checkpoints),
    "prune": (PruneArguments, prune_checkpoints),
}
"""Arguments and function of each command."""


def checkpoints_at(path: str) -> tuple[Store, list[str]]:
    """Return the store and the names meant by a directory or a file, oldest first.

    Raises:
        UserError: There is no checkpoint there.
    """
    directory, own_name = split_url(path)
    is_file = own_name.endswith(".pt") or os.path.isfile(path)
    store = open_store(directory if is_file else path)
    try:
        names = [entry.name for entry in store.entries()]
    except NotADirectoryError:
        names = []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Check the path.") from error
    names = [
        name for name in names if name == own_name or (is_checkpoint_name(name) and not is_file)
    ]
    if not names:
        raise UserError(f"{path} is not a checkpoint and holds none. Check the path.")
    summaries = {name: read_summary(store, name) for name in names}

    def age(name: str) -> tuple[Any, ...]:
        summary = summaries[name]
        place = (summary["created_at"], *position(summary)) if summary else (0.0, 0, 0)
        return (*place, parse_epoch_name(name) is None, name == LATEST)

    return store, sorted(names, key=age)
