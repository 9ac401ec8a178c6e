"""The life of one worker: plan, join the group, train, and leave in the right way.

Whatever ends it (the end of training, a signal, an error, the death of another worker), the newest
captured state is saved first and the exit code says what happened.
"""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from trm_dist.checkpoint.client import PersisterClient
from trm_dist.checkpoint.manager import CheckpointManager, Inherited, Snapshots
from trm_dist.checkpoint.memory import Slots, SnapshotDir, remove_if_unlocked, take_slots
from trm_dist.checkpoint.resume import remembered
from trm_dist.checkpoint.snapshot import Flat
from trm_dist.checkpoint.store import Store, open_store
from trm_dist.config import CheckpointConfig, Config
from trm_dist.elastic.agent import end_agent, guardian, is_restart, will_restart
from trm_dist.elastic.preemption import StopListener, exit_code
from trm_dist.elastic.world import World, form_group, launch_id
from trm_dist.errors import (
    EXIT_GAVE_UP,
    EXIT_USAGE,
    ConfigError,
    FencedError,
    StoreError,
    TrainingError,
    TrmDistError,
    UserError,
)
from trm_dist.events import Emit, Stopped
from trm_dist.logs import tell
from trm_dist.observe.console import console, only_trouble
from trm_dist.plan import Plan, check_space, make_plan
from trm_dist.share import share_plan
from trm_dist.train import Trainer, pin_numerics

logger = logging.getLogger(__name__)

_SIGNS_OF_A_LOST_WORKER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
)  # fmt: skip
"""How gloo's RuntimeError tells that the other end of a connection has ended or is silent."""

_HEADER_GROWTH_BYTES = 4096
"""Room for counters that get longer."""

_MOST_PLANS = 5

_STORE_WAIT_S = 240.0
"""How long a restarted writer waits for its store; the others wait for it a little longer."""

_STORE_PAUSE_S = 2.0


@dataclass(slots=True)
class _Saving:
    """What it takes to save the newest state; filled in as it comes to be."""

    emit: Emit
    manager: CheckpointManager | None = None
    slots: Slots | None = None
    grace_s: float = 0.0


def train(config: Config, given: frozenset[str]) -> NoReturn:
    """Train to the end, and end the process.

    Args:
        config: What the command line said, defaults included.
        given: Names of the settings that were really given.

    Raises:
        UserError: Found before the process group exists; later ones end the process.
    """
    world = World.from_environment(os.environ)
    plan = persister = None
    saving = _Saving(only_trouble)
    if world.is_writer:
        plan, persister = _plan_and_claim(config, given)
        log = plan.config.log
        saving.emit = console(log.log_format, log_every_s=log.log_every_s)
    group = form_group(world, os.environ, config.train.hang_timeout)
    listener = StopListener(lambda signum: _stop(signum, saving))
    listener.start()
    try:
        plan, identity = share_plan(plan, config, given, group)
        pin_numerics(plan.config.train.threads)
        trainer = Trainer(plan, group, saving.emit)
        checkpoint = plan.config.checkpoint
        has_name = not plan.start.is_unnamed
        plan = None  # its state is not needed while training
        snapshots = None
        if world.is_first_of_node:
            # Where this node keeps them is its own affair, not the writer's.
            snapshots = _take_snapshots(trainer, config.checkpoint, identity, saving)
        if snapshots and persister and saving.slots:
            inherited = Inherited(persister.attach(saving.slots), has_name)
            saving.grace_s = checkpoint.grace_period
            saving.manager = CheckpointManager(
                snapshots, persister, checkpoint, saving.emit, inherited
            )
        losses = trainer.loss_log(saving.slots.loss_log) if saving.slots else None
        trainer.run(saving.manager or snapshots, saving.manager, losses)
    except Exception as error:  # noqa: BLE001 the border: whatever it was, the newest state is kept
        _give_up(error, saving, listener)
    _forget_snapshots(saving)
    _leave(0)


def _plan_and_claim(config: Config, given: frozenset[str]) -> tuple[Plan, PersisterClient]:
    """Make the plan, and start or adopt the persister that writes for this worker."""
    store = open_store(config.checkpoint.checkpoint_dir)
    memory = SnapshotDir(config.checkpoint.snapshot_dir, store.identity)
    url = store.url if "://" in store.url else os.path.abspath(store.url)
    persister = PersisterClient(url, store.identity, guardian(os.environ))
    try:
        plan = _plan_patiently(store, memory, persister, config, given)
    except BaseException:
        persister.close()
        raise
    check_space(plan, store)
    return plan, persister


def _plan_patiently(
    store: Store, memory: SnapshotDir, persister: PersisterClient, config: Config,
    given: frozenset[str],
) -> Plan:  # fmt: skip
    """Plan; a restarted worker waits for a store that is away, as nobody is there to mend it."""
    give_up_at = time.monotonic() + min(config.checkpoint.store_deadline, _STORE_WAIT_S)
    while True:
        try:
            return _plan_as_writer(store, memory, persister, config, given)
        except UserError as error:
            is_away = isinstance(error.__cause__, OSError) and not isinstance(
                error.__cause__, FileNotFoundError | IsADirectoryError | PermissionError
            )
            if not (is_away and is_restart(os.environ)) or time.monotonic() > give_up_at:
                raise
            logger.warning("%s This is a restart: trying again.", error)
            time.sleep(_STORE_PAUSE_S)


def _plan_as_writer(
    store: Store, memory: SnapshotDir, persister: PersisterClient, config: Config,
    given: frozenset[str],
) -> Plan:  # fmt: skip
    """Plan, then become the only writer; plan anew if another one wrote in between."""
    try:
        for _ in range(_MOST_PLANS):
            seen = store.entries()
            plan = make_plan(config, given, launch_id(os.environ), remembered(memory.held()))
            checkpoint = plan.config.checkpoint
            run = persister.open(
                plan.start.run,
                deadline_s=checkpoint.store_deadline,
                keep_last=checkpoint.keep_last,
                keep_every=checkpoint.keep_every,
            )
            if store.entries() == seen:
                break
    except OSError as error:
        raise ConfigError(
            f"--checkpoint-dir {store.url} cannot be written: {error}. Mend that or choose another."
        ) from error
    return plan.as_run(run)


def _take_snapshots(
    trainer: Trainer, checkpoint: CheckpointConfig, identity: str, saving: _Saving
) -> Snapshots:
    """Take this node's memory for snapshots of the trainer's state."""
    flat = Flat(trainer.state())
    saving.slots = take_slots(
        checkpoint.snapshot_dir,
        identity,
        num_slots=checkpoint.snapshot_slots,
        header_bytes=len(flat.header) + _HEADER_GROWTH_BYTES,
        body_bytes=flat.num_bytes,
    )
    return Snapshots(saving.slots)


def _forget_snapshots(saving: _Saving) -> None:
    """Leave no memory behind when all of it is committed."""
    if saving.manager:
        saving.manager.close()
    if saving.slots:
        remove_if_unlocked(saving.slots)


def _stop(signum: int, saving: _Saving) -> NoReturn:
    """End this worker for a signal: no collective, no agreement, the newest state saved."""
    manager = saving.manager
    if manager:
        if manager.freeze(saving.grace_s):
            _save_newest(manager, saving)
        if manager.captured:
            saving.emit(Stopped(progress=manager.captured, reason=signal.Signals(signum).name))
    _leave(exit_code(signum))


def _save_newest(manager: CheckpointManager, saving: _Saving) -> None:
    """Keep this process alive until the persister has committed, or the grace period is over."""
    try:
        if manager.save_newest(saving.grace_s):
            _forget_snapshots(saving)
            return
    except TrmDistError as error:
        tell(str(error))
        return
    except Exception:  # the process must end, whatever it was; the snapshot is in memory
        logger.exception("the newest state could not be saved")
        return
    logger.error(
        "the newest state is not committed after --grace-period %.0f s; it is in memory, and the "
        "persister goes on as long as this node lives",
        saving.grace_s,
    )


def _give_up(error: Exception, saving: _Saving, listener: StopListener) -> NoReturn:
    """End this worker for an error: the newest state saved, one message or a traceback."""
    manager = saving.manager
    is_lost_worker = any(sign in str(error) for sign in _SIGNS_OF_A_LOST_WORKER)
    if isinstance(error, TrmDistError):
        # Of the errors that all workers see alike, one speaks.
        if str(error) and (manager or isinstance(error, UserError)):
            tell(str(error))
    elif is_lost_worker:
        logger.warning("another worker is gone (%s)", str(error).splitlines()[0])
    else:
        logger.error("training failed", exc_info=error)
    if isinstance(error, UserError | TrainingError | StoreError | FencedError):
        end_agent(os.environ)  # a restart would meet it again
    if listener.stopping.is_set():  # the stop saves and ends this process
        threading.Event().wait()
    # The workers that come next find the newest state in memory, and the persister publishes it.
    is_safe_in_memory = is_lost_worker and will_restart(os.environ)
    if manager and not is_safe_in_memory and not isinstance(error, StoreError | FencedError):
        _save_newest(manager, saving)
    _leave(EXIT_USAGE if isinstance(error, UserError) else EXIT_GAVE_UP)


def _leave(code: int) -> NoReturn:
    """End the process at once: tearing gloo and DDP down aborts in every second finished run."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a reader that has left
            stream.flush()
    os._exit(code)
