"""Where a run goes on: the newest valid state, a branch from an older one, or a fresh start."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from trm_dist.checkpoint.archive import plain, summarize
from trm_dist.checkpoint.catalog import Found, find_checkpoints, is_whole, position
from trm_dist.checkpoint.memory import Held
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name, parse_epoch_name
from trm_dist.checkpoint.runs import RECORD, Run, read_run
from trm_dist.checkpoint.seal import Seal, verify_seal
from trm_dist.checkpoint.snapshot import unflatten
from trm_dist.checkpoint.state import KEYS, from_bytes
from trm_dist.checkpoint.store import Store, open_store, split_url
from trm_dist.config import CheckpointConfig
from trm_dist.errors import CorruptCheckpointError, ResumeError

logger = logging.getLogger(__name__)


MEMORY = "memory"
"""Source of a start from a snapshot that a dead worker has left."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a run starts: which run and branch it is, and from which verified state."""

    run: Run
    source: str
    """Where the state was read, for people; empty: a fresh start."""
    state: dict[str, Any] | None
    """None: a fresh start."""
    is_unnamed: bool = False
    """Whether no file has the name that a checkpoint of this state may be due."""
    newest_named: int = 0
    """Batches that the newest file of this branch with a name of its own has seen."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A snapshot in memory that holds the state of a run."""

    summary: dict[str, Any]
    held: Held

    @property
    def batch_count(self) -> int:
        """Batches it has seen."""
        return int(self.summary["batch_count"])


def remembered(held: Iterable[Held]) -> list[Remembered]:
    """Return the snapshots that hold a state of this format; their headers were checked."""
    found = []
    for each in held:
        content = plain(json.loads(each.header)["tree"])
        if content.keys() >= KEYS:
            found.append(Remembered(summarize(content), each))
    return found


def newest_of(run: Run, memory: Iterable[Remembered]) -> Remembered | None:
    """Return the newest snapshot of a run's branch."""
    ours = [each for each in memory if run.is_that_of(each.summary)]
    return max(ours, key=lambda each: position(each.summary), default=None)


def choose_start(
    store: Store,
    config: CheckpointConfig,
    launch_id: str,
    memory: Iterable[Remembered] = (),
    *,
    is_again: bool = False,
) -> Start:
    """Choose where to start; nothing is written.

    Args:
        store: The store of `--checkpoint-dir`.
        config: `--resume` and what goes with it.
        launch_id: Names this launch; its restarted workers give the same one.
        memory: Snapshots that dead workers have left on this node.
        is_again: Whether this launch has started workers before. Else an empty store is a new one:
            what lies in memory was of another under the same path, or of what was there before.

    Raises:
        ResumeError: There is nothing valid to go on from, or `--resume never` meets checkpoints.
    """
    found = find_checkpoints(store)
    memory = list(memory)
    told = [each.seal.summary for each in found if each.seal]
    run = read_run(store) or Run.rebuilt(told + [each.summary for each in memory if is_again])
    here = _Here(store, run, found, memory)
    is_restart = run is not None and bool(run.launch_id) and run.launch_id == launch_id
    if config.resume == "never" and not is_restart:
        return _start_over(store, found, config, launch_id)
    names_a_file = config.resume not in {"auto", "never"}
    if names_a_file and not _is_latest_of(config.resume, store.url):
        return _branch(here, config, launch_id=launch_id, is_restart=is_restart)
    newest = here.newest()
    if newest is not None:
        return newest
    if config.resume != "never":  # the restart of a launch that starts over needs no old state
        _refuse_if_lost(store, run, found)
    if names_a_file:
        raise ResumeError(
            f"--resume {config.resume}: {store.url} holds no checkpoint. Check the path, or leave "
            "--resume out to start fresh."
        )
    return Start(run or Run.fresh(launch_id), "", None)


def _start_over(
    store: Store, found: list[Found], config: CheckpointConfig, launch_id: str
) -> Start:
    if found and not config.overwrite:
        raise ResumeError(
            f"--resume never: {store.url} already holds {len(found)} checkpoint(s), such as "
            f"{found[0].name}. Choose another --checkpoint-dir, or add --overwrite to start over."
        )
    return Start(Run.fresh(launch_id), "", None)


def _branch(here: "_Here", config: CheckpointConfig, *, launch_id: str, is_restart: bool) -> Start:
    """Start or continue the branch that begins at the file `--resume` names."""
    # The branch of a restarted launch is its own: its origin may have been overwritten since.
    run = here.run
    newest = here.newest() if is_restart else None
    if newest is not None:
        return newest
    where = _location(config.resume)
    is_known = run is not None and run.origin_url == where and not config.overwrite
    if is_known and not _exists(config.resume):  # cleaned up since; the branch lives on
        newest = here.newest()
        if newest is not None:
            return newest
    origin = _read_origin(config.resume)
    if run is not None and run.origin == origin.seal.digest and not config.overwrite:
        return here.newest() or Start(run, config.resume, origin.state)
    is_foreign = run is not None and run.run_id != origin.seal.summary["run_id"]
    if is_foreign and here.found and not config.overwrite:
        raise ResumeError(
            f"--resume {config.resume}: this is of another run than {here.store.url}, whose newest "
            "state it would replace. Choose another --checkpoint-dir, or add --overwrite."
        )
    begun = (run or Run.fresh(launch_id)).next_branch(origin.seal.digest, where, launch_id)
    return Start(begun, config.resume, origin.state)


@dataclass(frozen=True, slots=True)
class _Origin:
    seal: Seal
    state: dict[str, Any]


def _read_origin(url: str) -> _Origin:
    directory, name = split_url(url)
    store = open_store(directory)
    try:
        data = store.view(name)
        return _Origin(verify_seal(data), from_bytes(data))
    except FileNotFoundError as error:
        raise ResumeError(
            f"--resume {url}: there is no such file. `trm_dist ls DIR` lists what there is."
        ) from error
    except IsADirectoryError as error:
        raise ResumeError(
            f"--resume {url}: this is a directory. Give it as --checkpoint-dir; its newest state "
            "is then taken without --resume."
        ) from error
    except OSError as error:
        raise ResumeError(f"--resume {url} cannot be read: {error}. Check the path.") from error
    except CorruptCheckpointError as error:
        raise ResumeError(
            f"--resume {url}: {error}. Choose another checkpoint; `trm_dist verify DIR` names the "
            "good ones."
        ) from error


@dataclass(frozen=True, slots=True)
class _Here:
    """What there is: the files of a store, and the snapshots of this node."""

    store: Store
    run: Run | None
    found: list[Found]
    memory: list[Remembered]

    def newest(self) -> Start | None:
        """Return the newest valid state of the run's current branch, or the one it begins from."""
        if self.run is None:
            return None
        snapshot = newest_of(self.run, self.memory)
        for each in _by_age(self.run, self.found):
            # A snapshot that is as new needs no download.
            if snapshot and each.seal and position(each.seal.summary) <= position(snapshot.summary):
                break
            try:
                state = from_bytes(self.store.view(each.name))
            except FileNotFoundError:
                continue
            except CorruptCheckpointError as error:
                logger.warning("%s is damaged (%s); an older one is tried", each.name, error)
                continue
            source = os.path.join(self.store.url, each.name)
            return Start(self.run, source, state, newest_named=self._newest_named(self.run))
        return self.start_from(snapshot) if snapshot else None

    def start_from(self, snapshot: Remembered) -> Start:
        """Go on from memory."""
        assert self.run is not None, "it is of this run"
        own_name = epoch_name(snapshot.summary["epoch"], snapshot.summary["batch_idx"] or 1)
        is_unnamed = own_name not in {each.name for each in self.found}
        held = snapshot.held.copied()  # its writer may be alive, and is replaced only after this
        state = unflatten(held.header, held.body)
        return Start(self.run, MEMORY, state, is_unnamed, self._newest_named(self.run))

    def _newest_named(self, run: Run) -> int:
        named = [each.seal for each in self.found if each.seal and parse_epoch_name(each.name)]
        ours = [each.summary for each in named if run.is_that_of(each.summary)]
        return max((int(each["batch_count"]) for each in ours), default=0)


def _refuse_if_lost(store: Store, run: Run | None, found: list[Found]) -> None:
    """Refuse a silent fresh start where a state should have been found.

    Raises:
        ResumeError: There are files of this run and none is valid, or a branch has lost its origin.
    """
    # Verified whole: a flipped bit in a seal can make a file look like that of another run.
    damaged = [each.name for each in found if not is_whole(store, each.name)]
    damaged += [each.name for each in _by_age(run, found)] if run else []
    damaged = sorted(set(damaged))
    if damaged:
        raise ResumeError(
            f"{store.url} holds checkpoints and none of them is valid: {', '.join(damaged)}. "
            "Nothing was changed. Restore one from a copy, or start over with "
            "--resume never --overwrite."
        )
    if run and run.origin:
        raise ResumeError(
            f"{store.url}: branch {run.branch} of the run has no checkpoint yet, and the one it "
            "begins from is not here any more. Name it with --resume PATH."
        )
    if found:
        raise ResumeError(
            f"{store.url} holds checkpoints of another run than its {RECORD} names, and a fresh "
            "start would overwrite them. To go on with them remove that file; to start over use "
            "--resume never --overwrite."
        )


def _by_age(run: Run, found: list[Found]) -> list[Found]:
    """Return the current branch's files, newest first, and last the one the branch begins from."""
    rank = {LATEST: 2, FINAL: 1}
    placed, origins = [], []
    for each in found:
        if each.seal is None:
            continue
        summary = each.seal.summary
        if run.is_that_of(summary):
            placed.append((position(summary), rank.get(each.name, 0), each))
        elif run.origin and each.seal.digest == run.origin:
            origins.append(each)
    placed.sort(key=lambda item: item[:2], reverse=True)
    return [each for *_, each in placed] + origins


def _location(url: str) -> str:
    """Name a file alike however its path is spelled; short, as it goes into every seal."""
    directory, name = split_url(url)
    place = f"{open_store(directory).identity}/{name}"
    return blake2b(place.encode(), digest_size=8).hexdigest()


def _exists(url: str) -> bool:
    directory, name = split_url(url)
    try:
        open_store(directory).read(name, 0, 1)
    except FileNotFoundError:
        return False
    return True


def _is_latest_of(resume: str, directory: str) -> bool:
    folder, name = split_url(resume)
    return name == LATEST and open_store(folder).identity == open_store(directory).identity
