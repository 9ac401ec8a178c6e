"""What a supervisor decides, with nothing below it."""

import asyncio
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trm_dist.config import Config
from trm_dist.elastic.agent import PULSE
from trm_dist.elastic.pulse import START_LIMIT_S, Pulse
from trm_dist.launch.health import _response
from trm_dist.launch.job import LaunchConfig, job_of
from trm_dist.launch.supervisor import Supervisor


class Alone(Supervisor):
    """A supervisor whose zygotes are only counted."""

    def __init__(self) -> None:
        config = Config().with_values({"spot": "none"})
        super().__init__(job_of(LaunchConfig(), config, (), {}))
        self.starts = 0

    async def _start_zygote(self) -> None:
        self.starts += 1
        self._events.put_nowait({"is": "gone"})

    def _send(self, content: Mapping[str, Any]) -> None:
        """Send nothing."""


async def stop_in_a_long_pause() -> None:
    supervisor = Alone()

    async def stop() -> None:
        while supervisor.starts < 3:
            await asyncio.sleep(0.01)
        supervisor._agent_failures = 20  # the next pause is a minute
        supervisor._events.put_nowait({"is": "gone"})
        await asyncio.sleep(0.1)
        supervisor._events.put_nowait({"is": "signal", "number": signal.SIGTERM})

    async with asyncio.timeout(20):
        stopping = asyncio.create_task(stop())
        code = await supervisor.run()
        await stopping
    print("code", code, "starts", supervisor.starts)  # noqa: T201 to the test


def test_stop_is_heard_in_the_longest_pause() -> None:
    # In a process of its own, as a supervisor reaps all children of its process.
    command = [sys.executable, "-m", "tests.unit.test_supervisor"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == ["code", "143", "starts", "3"], done.stderr


def test_health_is_lost_with_the_signs_of_life_of_one_worker_while_training() -> None:
    config = Config().with_values({"spot": "none"})
    supervisor = Supervisor(job_of(LaunchConfig(nproc_per_node=2), config, (), {}))
    variables = {PULSE: str(supervisor._pulse_descriptor)}
    workers = [Pulse.of_worker(variables, slot, 0.0) for slot in range(2)]
    for each in workers:
        each.beat(7)
    supervisor._state = "training"
    assert _response("GET /healthz HTTP/1.1", supervisor._health).startswith(b"HTTP/1.1 200")
    long_ago = time.monotonic() - 3 * START_LIMIT_S
    struct.pack_into("<ddq", workers[1]._buffer, 24, long_ago, START_LIMIT_S, 7)
    assert _response("GET /healthz HTTP/1.1", supervisor._health).startswith(b"HTTP/1.1 503")
    supervisor._state = "meeting"  # it waits for the other nodes
    assert _response("GET /healthz HTTP/1.1", supervisor._health).startswith(b"HTTP/1.1 200")


if __name__ == "__main__":
    asyncio.run(stop_in_a_long_pause())
