"""`trm_dist launch`: the first process of a node and the last one. No torch is in it.

It has everything started by the zygote, hears how it goes, and decides: start again, give up, or
leave because it was told to. What it decides by is small: exit codes of workers (see `errors`),
signals, notices, and whether batches get finished in between.
"""

import asyncio
import ctypes
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from trm_dist.elastic.agent import LAUNCH, LAUNCHED_AT, RESTARTS
from trm_dist.elastic.notice import watch
from trm_dist.elastic.preemption import exit_code
from trm_dist.elastic.process import ended_by, is_stopped, started_at
from trm_dist.elastic.pulse import new_pulse
from trm_dist.elastic.restarts import Budget, pause_s
from trm_dist.errors import (
    EXIT_GAVE_UP,
    EXIT_HOPELESS,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_PREEMPTED,
    EXIT_REPLACED,
    EXIT_UNFIT,
    EXIT_USAGE,
)
from trm_dist.launch.health import serve_health
from trm_dist.launch.job import Job
from trm_dist.logs import tell

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_MAX_MESSAGE_BYTES = 1 << 20
STOP_MARGIN_S = 5
"""What ending the processes may take after the grace period."""
_HUNG_TIMES, _HUNG_MORE_S = 1.2, 5.0
"""How much longer than its own watchdog the supervisor waits for a worker."""
_MOST_REPLACED = 10
"""How often a node meets the others anew; two jobs of one name would take turns for ever."""
_FINISH_S = 15.0
"""How long an agent may wait for the other nodes after its workers have finished."""


class Supervisor:
    """Keeps one node of a job going."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._pulse_descriptor, self._pulse = new_pulse(job.member.num_workers)
        self._budget = Budget(job.max_no_progress)
        self._zygote = 0
        """Its process id; 0 once it is reaped."""
        self._num_zygotes = 0
        self._can_start = False
        """Whether the zygote has imported what workers need."""
        self._control: socket.socket | None = None
        self._address = ""
        self._living: dict[int, dict[str, Any]] = {}
        self._num_finished = 0
        self._has_failed = False
        """Whether a worker of the present group has."""
        self._cause = ""
        """The newest failure, in words."""
        self._has_agent = False
        self._agent_failures = 0
        self._num_replaced = 0
        self._moves_on = False
        """Whether all nodes must meet anew."""
        self._state = "starting"
        self._deadline_s = 0.0

    async def run(self) -> int:
        """Run until the end of the run or of this node's part in it; returns the exit code."""
        loop = self._loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(each, self._events.put_nowait, {"is": "signal", "number": each})
        watch(self._job.spot, self._hear_notice)
        # Orphans of this node, such as the persister of a dead worker, can be waited for.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        server = None
        if self._job.health_port:
            server = await serve_health(self._job.health_port, self._health)
        watching = loop.create_task(self._watch_pulse())
        try:
            await self._start_zygote()
            return await self._keep_going()
        finally:
            watching.cancel()
            if server:
                server.close()
            await self._end()
            signal.set_wakeup_fd(-1)  # the loop closes its end of it before it lets signals go

    async def _keep_going(self) -> int:
        """Act on one event after the other until one of them ends this node's part."""
        act: dict[str, Callable[[dict[str, Any]], Awaitable[int | None]]] = {
            "signal": lambda event: self._stop(event["number"]),
            "notice": self._leave,
            "hung": self._end_hung,
            "ready": self._get_ready,
            "pause is over": lambda event: event["then"](),
            "worker": self._welcome,
            "ended": self._judge,
            "left": self._replace_agent,
            "gone": self._replace_zygote,
        }
        while True:
            event = await self._events.get()
            code = await act[event["is"]](event)
            if code is not None:
                return code

    # -- what happens ------------------------------------------------------------------------------

    async def _get_ready(self, event: dict[str, Any]) -> None:
        self._can_start = True
        if not event["can_fork"]:
            logger.warning(
                "a library has started a thread, so workers are started as commands, which takes "
                "seconds at every restart"
            )
        await self._join()

    async def _welcome(self, event: dict[str, Any]) -> None:
        self._living[event["pid"]] = event | {"since_s": time.monotonic()}
        self._state, self._has_failed = "training", False

    async def _judge(self, event: dict[str, Any]) -> int | None:
        """Hear of a worker's end; return the exit code if it is that of the run."""
        self._living.pop(event["pid"], None)
        code = event["code"]
        if code == 0:
            self._num_finished += 1
            is_all = self._num_finished == self._job.member.num_workers
            return await self._finish() if is_all else None
        self._num_finished = 0
        if code == EXIT_REPLACED and self._num_replaced < _MOST_REPLACED:
            self._meet_anew(event["rank"])
            return None
        if code in {EXIT_USAGE, EXIT_HOPELESS, EXIT_REPLACED, EXIT_UNFIT}:
            return await self._end_for_good(event)
        if code in {EXIT_PREEMPTED, EXIT_INTERRUPTED}:
            logger.warning(
                "worker %d was told to stop and has saved; all start again", event["rank"]
            )
        elif not (event["was_killed"] or code == EXIT_LOST or self._has_failed):
            return await self._count_failure(event)
        return None

    async def _end_for_good(self, event: dict[str, Any]) -> int:
        """End what another start would not mend: this node's part, or the run."""
        if event["code"] == EXIT_UNFIT:
            return await self._leave({"text": f"worker {event['rank']}: {event['error']}"})
        self._cause = ""  # that of an earlier failure; the worker itself has told of this one
        return await self._give_up(EXIT_USAGE if event["code"] == EXIT_USAGE else EXIT_GAVE_UP)

    def _meet_anew(self, rank: int) -> None:
        """Bring together the groups into which the workers of this job have split."""
        logger.warning("worker %d was replaced by another group of this job; all meet anew", rank)
        self._num_replaced += 1
        self._moves_on = True
        self._send({"do": "leave"})

    async def _count_failure(self, event: dict[str, Any]) -> int | None:
        """Hear of the first failure in a group of workers; the others are its consequences."""
        self._has_failed = True
        self._cause = f"worker {event['rank']}: {event['error'] or ended_by(event['code'])}"
        stopped = [each["rank"] for pid, each in self._living.items() if is_stopped(pid)]
        if stopped:
            self._cause += f"; stopped by a signal: worker {', '.join(map(str, stopped))}"
        return await self._give_up(EXIT_GAVE_UP) if self._is_in_vain() else None

    def _is_in_vain(self) -> bool:
        """Count a failure, tell its cause, and tell whether another start is in vain."""
        self._budget.fail(max(each.batch_count for each in self._pulse.signs()))
        count = self._budget.failures
        logger.warning(
            "%s; starting again%s", self._cause,
            f" after {count} failures without a new batch" if count > 1 else "",
        )  # fmt: skip
        if self._budget.is_spent:
            tell(
                f"gave up: started {count} times without finishing a batch (--max-no-progress). "
                "What was finished is kept; mend the cause and give the same command again."
            )
        return self._budget.is_spent

    async def _end_hung(self, event: dict[str, Any]) -> int | None:
        """End a worker that cannot end itself, such as one that was stopped."""
        if event["pid"] not in self._living:
            return None
        worker, code = self._living[event["pid"]], None
        limit_s = self._pulse.signs()[worker["local_rank"]].limit_s
        error = f"no sign of life for {limit_s:.0f} s (--hang-timeout)"
        if not self._has_failed:
            code = await self._count_failure(worker | {"error": error})
        self._send({"do": "kill", "pid": event["pid"], "rank": worker["rank"], "error": error})
        return code

    async def _replace_agent(self, event: dict[str, Any]) -> int | None:
        """Start the next agent, after a while if the last ones have not come to train."""
        self._has_agent = False
        if event["code"] in {0, EXIT_USAGE, EXIT_GAVE_UP}:  # as the run has ended elsewhere
            return int(event["code"])
        if event["code"] < 0:
            logger.warning("the agent was %s; joining again", ended_by(event["code"]))
        self._agent_failures = 0 if self._state == "training" else self._agent_failures + 1
        self._after_a_pause(self._join)
        return None

    async def _replace_zygote(self, _event: dict[str, Any]) -> int | None:
        self._living.clear()
        self._has_agent = False
        self._agent_failures += 1
        if self._can_start:
            logger.warning("the zygote is gone and is replaced")
        else:  # as where torch cannot be imported
            self._cause = "the zygote has ended before it could start a worker"
            if self._is_in_vain():
                return EXIT_GAVE_UP
        self._after_a_pause(self._start_zygote)
        return None

    def _after_a_pause(self, then: Callable[[], Awaitable[None]]) -> None:
        """Go on a little later, the longer the more often in a row; other events come meanwhile."""
        event = {"is": "pause is over", "then": then}
        pause = pause_s(self._agent_failures)
        self._loop.call_later(pause, self._events.put_nowait, event)

    async def _leave(self, event: dict[str, Any]) -> int:
        logger.warning("%s: this node saves and leaves", event["text"])
        return await self._stop(signal.SIGTERM)

    # -- the end -----------------------------------------------------------------------------------

    async def _finish(self) -> int:
        """End after all workers have finished; the agent waits for the other nodes a while."""
        await self._wait_for("left", _FINISH_S)
        return 0

    async def _give_up(self, code: int) -> int:
        """End because the run cannot go on, here or on any other node."""
        self._send({"do": "stop", "signal": signal.SIGTERM})
        await self._wait_for("left", self._job.grace_s + STOP_MARGIN_S)
        if self._job.member.endpoint:
            self._send({"do": "join"} | self._message() | {"conclude": code})
            await self._wait_for("left", _FINISH_S)
        if self._cause:
            tell(f"the cause: {self._cause}")
        return code

    async def _stop(self, signum: int) -> int:
        """Leave: the workers save the newest state; a second Ctrl+C leaves at once."""
        self._state = "stopping"
        started_s = time.monotonic()
        self._deadline_s = started_s + self._job.grace_s
        self._send({"do": "stop", "signal": signum})
        if not self._has_agent:
            return exit_code(signum)
        if await self._wait_for("left", self._job.grace_s + STOP_MARGIN_S, is_stop=True):
            logger.info("left in %.1f s", time.monotonic() - started_s)
        return exit_code(signum)

    async def _wait_for(self, kind: str, wait_s: float, *, is_stop: bool = False) -> bool:
        """Let things happen until one of a kind has; a second Ctrl+C ends a stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while (event := await self._events.get())["is"] not in {kind, "gone"}:
                    if is_stop and event == {"is": "signal", "number": signal.SIGINT}:
                        self._deadline_s = 0.0
                        return False
                return True
        return False

    # -- processes ---------------------------------------------------------------------------------

    async def _start_zygote(self) -> None:
        self._can_start = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = f"trm_dist-zygote-{secrets.token_hex(8)}"
        listener.bind(f"\0{self._address}")
        listener.listen(128)
        inherited = [each.fileno() for each in (theirs, listener)] + [self._pulse_descriptor]
        zygote = subprocess.Popen(  # noqa: S603 our own module
            [
                sys.executable, "-m", "trm_dist", "zygote", *map(str, inherited),
                *self._job.arguments,
            ],
            env={**self._job.environment, RESTARTS: str(self._num_zygotes)},
            pass_fds=inherited, start_new_session=True,
        )  # fmt: skip
        self._zygote = zygote.pid
        self._num_zygotes += 1
        zygote.returncode = 0  # it is reaped with all the others
        theirs.close()
        listener.close()
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._hear)

    async def _watch_pulse(self) -> None:
        """Look for workers that have hung and whose own watchdogs cannot end them."""
        while True:
            await asyncio.sleep(1.0)
            now, signs = time.monotonic(), self._pulse.signs()
            for pid, worker in self._living.items():
                sign = signs[worker["local_rank"]]
                is_of_this_one = sign.at_s > worker["since_s"]
                if is_of_this_one and now - sign.at_s > _HUNG_TIMES * sign.limit_s + _HUNG_MORE_S:
                    self._events.put_nowait({"is": "hung", "pid": pid})

    def _hear_notice(self, text: str) -> None:
        """Hear of a notice, in another thread."""
        with suppress(RuntimeError):  # it has ended meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, {"is": "notice", "text": text})

    def _hear(self) -> None:
        assert self._control is not None, "started"
        try:
            message = self._control.recv(_MAX_MESSAGE_BYTES)
        except OSError:
            message = b""
        if message:
            self._events.put_nowait(json.loads(message))
            return
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        self._control = None
        self._events.put_nowait({"is": "gone"})

    def _send(self, content: Mapping[str, Any]) -> None:
        if self._control is not None:
            with suppress(OSError):  # its end will be heard of
                self._control.send(json.dumps(content).encode())

    async def _join(self) -> None:
        self._state, self._has_agent = "meeting", True
        self._num_finished = 0
        self._send({"do": "join", "move_on": self._moves_on} | self._message())
        self._moves_on = False

    def _message(self) -> dict[str, Any]:
        stub = os.path.join(os.path.dirname(__file__), "stub.py")
        command = [sys.executable, "-I", "-S", stub, self._address]
        return {
            "environment": {
                LAUNCH: self._job.launch_id,
                LAUNCHED_AT: str(started_at(os.getpid())),
            },
            **asdict(replace(self._job.member, command=command)),
        }

    async def _end(self) -> None:
        """End what is left; the persister may use what is left of the grace period."""
        if self._zygote:
            os.kill(self._zygote, signal.SIGKILL)
        while self._reap() and (self._zygote or time.monotonic() < self._deadline_s):
            await asyncio.sleep(0.01)

    def _reap(self) -> bool:
        """Reap the children that have ended; tell whether any is left."""
        try:
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid == self._zygote:
                    self._zygote = 0
        except ChildProcessError:
            return False
        return True

    # -- health ------------------------------------------------------------------------------------

    def _health(self) -> tuple[bool, dict[str, Any]]:
        """Tell how it goes; who waits for others or is about to leave is well."""
        is_alive, signs = self._pulse.health()
        return self._state != "training" or is_alive, {
            "state": self._state,
            **signs,
            "workers": len(self._living),
            "failures_without_progress": self._budget.failures,
        }


def supervise(job: Job) -> int:
    """Keep a node going to the end and return the exit code."""
    try:
        return asyncio.run(Supervisor(job).run())
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
