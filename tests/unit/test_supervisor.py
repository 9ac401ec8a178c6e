"""What a supervisor decides, with nothing below it."""

import asyncio
import signal
from collections.abc import Mapping
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
        self.sent: list[Mapping[str, Any]] = []

    async def _start_zygote(self) -> None:
        self.starts += 1
        self._events.put_nowait({"is": "gone"})

    def _send(self, content: Mapping[str, Any]) -> None:
        self.sent.append(content)


def test_stop_is_heard_in_the_longest_pause() -> None:
    async def run() -> tuple[int, int]:
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
        return code, supervisor.starts

    code, starts = asyncio.run(run())
    assert code == 143
    assert starts == 3
