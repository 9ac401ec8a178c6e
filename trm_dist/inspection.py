"""Checkpoints for people and for scripts: list, inspect, verify."""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import tyro

from trm_dist.checkpoint.names import LATEST, is_checkpoint_name, parse_epoch_name
from trm_dist.checkpoint.publish import position, read_summary
from trm_dist.checkpoint.state import digest, find_damage, from_bytes
from trm_dist.checkpoint.store import Store, open_store, split_url
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
    store, names = _checkpoints_at(arguments.path)
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
    store, names = _checkpoints_at(arguments.path)
    name = names[-1]
    try:
        state = from_bytes(store.read(name))
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
    store, names = _checkpoints_at(arguments.path)
    damage = {}
    for name in names:
        with suppress(FileNotFoundError):  # a run that goes on may let it go meanwhile
            damage[name] = find_damage(store.read(name), name)
    if arguments.json:
        say(json.dumps([
            {"name": name, "is_good": not found, "damage": found} for name, found in damage.items()
        ]))  # fmt: skip
    else:
        for name, found in damage.items():
            say(f"{name}: {'good' if not found else 'DAMAGED: ' + '; '.join(found)}")
    return EXIT_GAVE_UP if any(damage.values()) else 0


def _checkpoints_at(path: str) -> tuple[Store, list[str]]:
    """Return the store and the names meant by a directory or a file, oldest first.

    Raises:
        UserError: There is no checkpoint there.
    """
    directory, own_name = split_url(path)
    is_file = os.path.isfile(open_store(path).url)
    store = open_store(directory if is_file else path)
    try:
        names = [entry.name for entry in store.entries()]
    except OSError:
        names = []
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
