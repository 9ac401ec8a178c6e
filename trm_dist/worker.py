"""The life of one worker: plan, join the group, train, and leave in the right way.

Whatever ends it (the end of training, a signal, an error, the death of another worker), the newest
captured state is saved first and the exit code says what happened.
"""

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from trm_dist.checkpoint.manager import CheckpointManager
from trm_dist.checkpoint.runs import write_run
from trm_dist.checkpoint.store import Store, open_store
from trm_dist.config import Config
from trm_dist.elastic.agent import end_agent
from trm_dist.elastic.preemption import StopListener, exit_code
from trm_dist.elastic.world import Group, World, form_group, launch_id
from trm_dist.errors import (
    EXIT_GAVE_UP,
    EXIT_USAGE,
    ConfigError,
    ResumeError,
    StoreError,
    TrainingError,
    TrmDistError,
    UserError,
)
from trm_dist.events import Emit, Event, Stopped
from trm_dist.logs import tell
from trm_dist.observe.console import console
from trm_dist.plan import Plan, check_space, from_message, make_plan, to_message
from trm_dist.train import Trainer, pin_numerics

logger = logging.getLogger(__name__)

_SIGNS_OF_A_LOST_WORKER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""How gloo's RuntimeError tells that the other end of a connection has ended."""

CLAIM_WAIT_S = 10.0
"""How long the writer of a dying group may keep the store."""


def train(config: Config, given: frozenset[str]) -> NoReturn:
    """Train to the end, and end the process.

    Args:
        config: What the command line said, defaults included.
        given: Names of the settings that were really given.

    Raises:
        UserError: Found before the process group exists; later ones end the process.
    """
    world = World.from_environment(os.environ)
    plan = manager = None
    emit: Emit = _hear_nothing
    if world.is_writer:
        store = open_store(config.checkpoint.checkpoint_dir)
        plan = _plan_and_claim(store, config, given)
        log = plan.config.log
        emit = console(log.log_format, log_every_s=log.log_every_s)
        manager = CheckpointManager(store, plan.start.run, plan.config.checkpoint, emit)
    group = form_group(world, os.environ)
    listener = StopListener(lambda signum: _stop(signum, manager, emit))
    listener.start()
    try:
        trainer = _build(plan, group, manager, emit)
        plan = None  # a checkpoint's bytes are not needed while training
        trainer.run()
    except Exception as error:  # noqa: BLE001 the border: whatever it was, the newest state is kept
        _give_up(error, manager, listener)
    _leave(0)


def _plan_and_claim(store: Store, config: Config, given: frozenset[str]) -> Plan:
    """Plan, then become the only writer; plan anew if another one wrote in between."""
    try:
        seen = store.entries()
        plan = make_plan(config, given, launch_id(os.environ))
        if not store.claim(CLAIM_WAIT_S):
            raise ResumeError(
                f"--checkpoint-dir {store.url}: another run is writing there. Stop it, or choose "
                "another directory."
            )
        if store.entries() != seen:
            plan = make_plan(config, given, launch_id(os.environ))
        write_run(store, plan.start.run)
    except OSError as error:
        raise ConfigError(
            f"--checkpoint-dir {store.url} cannot be written: {error}. Mend that or choose another."
        ) from error
    check_space(plan, store)
    return plan


def _build(
    plan: Plan | None, group: Group, manager: CheckpointManager | None, emit: Emit
) -> Trainer:
    """Share the writer's plan and its checkpoint, and build the trainer of this worker."""
    message = group.broadcast(to_message(plan) if plan else b"")
    data = group.broadcast(plan.start.data if plan else b"")
    plan = plan or from_message(message, data)
    pin_numerics(plan.config.train.threads)
    return Trainer(plan, group, manager, emit)


def _stop(signum: int, manager: CheckpointManager | None, emit: Emit) -> NoReturn:
    """End this worker for a signal: no collective, no agreement, the newest state saved."""
    if manager:
        manager.freeze()
        manager.save_newest()
        if manager.captured:
            emit(Stopped(progress=manager.captured, reason=signal.Signals(signum).name))
    _leave(exit_code(signum))


def _give_up(
    error: Exception, manager: CheckpointManager | None, listener: StopListener
) -> NoReturn:
    """End this worker for an error: the newest state saved, one message or a traceback."""
    if isinstance(error, TrmDistError):
        if manager or isinstance(error, UserError):  # of the others all workers see the same
            tell(str(error))
    elif any(sign in str(error) for sign in _SIGNS_OF_A_LOST_WORKER):
        logger.warning("another worker is gone (%s)", str(error).splitlines()[0])
    else:
        logger.error("training failed", exc_info=error)
    if isinstance(error, UserError | TrainingError | StoreError):  # a restart would meet it again
        end_agent(os.environ)
    if listener.stopping.is_set():  # the stop saves and ends this process
        threading.Event().wait()
    if manager:
        manager.save_newest()
    _leave(EXIT_USAGE if isinstance(error, UserError) else EXIT_GAVE_UP)


def _leave(code: int) -> NoReturn:
    """End the process at once: tearing gloo and DDP down aborts in every second finished run."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a reader that has left
            stream.flush()
    os._exit(code)


def _hear_nothing(_event: Event) -> None:
    """Stand in for the listener in workers that do not speak."""
