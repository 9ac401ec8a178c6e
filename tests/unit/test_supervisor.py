"""What a supervisor decides, with nothing below it."""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trm_dist.config import Config
from trm_dist.elastic.agent import LAUNCH, PULSE, RESTARTS
from trm_dist.elastic.pulse import START_LIMIT_S, Pulse
from trm_dist.errors import EXIT_UNFIT
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


def test_node_whose_gpu_is_gone_leaves_and_the_others_go_on() -> None:
    sent: list[Mapping[str, Any]] = []
    supervisor = Alone()
    supervisor._send = sent.append  # type: ignore[method-assign]
    event = {"pid": 1, "rank": 3, "code": EXIT_UNFIT, "was_killed": False, "error": "no GPU"}

    code = asyncio.run(supervisor._judge(event))

    assert code == 143
    assert sent == [{"do": "stop", "signal": signal.SIGTERM}]  # and no word to the other nodes


@pytest.mark.parametrize(("restarts", "code"), [("0", 2), ("1", EXIT_UNFIT)])
def test_worker_tells_a_gpu_that_is_gone_from_one_that_was_never_there(
    restarts: str, code: int, tmp_path: Path
) -> None:
    variables = {LAUNCH: "a", RESTARTS: restarts, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "trm_dist", "train", "--dataset", "sudoku4:train"]
    done = subprocess.run(
        [*command, "--device", "cuda"], env=os.environ | variables, cwd=tmp_path, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []


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
