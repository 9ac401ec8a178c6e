"""What a supervisor decides, with nothing below it."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trm_dist.config import Config
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


if __name__ == "__main__":
    asyncio.run(stop_in_a_long_pause())
