import os
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fcntl import ioctl

import pytest

from trm_dist import events
from trm_dist.observe.bar import Bar
from trm_dist.progress import Progress

AT = Progress(epoch=2, batch_idx=3, batch_count=13, global_step=26, samples_seen=130)
STARTED = events.Started(
    progress=AT, source="memory", world_size=4, settings={}, num_parameters=1, num_samples=100,
    notes={}, batches_per_epoch=10, total_batches=80, restarts=3,
    generation=5, failures=1, preemptions=2,
)  # fmt: skip
BATCH = events.Batch(
    progress=replace(AT, batch_count=14), loss=0.25, token_accuracy=0.7, exact_accuracy=0.125,
    mean_steps=2.0, lr=1e-3, num_samples=10, seconds=0.5,
)  # fmt: skip
COMMITTED = events.Committed(
    progress=AT, names=["checkpoint_latest.pt"], num_bytes=1000, seconds=0.5, waited_s=0.0
)
STOPPED = events.Stopped(progress=replace(AT, batch_count=14), reason="SIGTERM")


@dataclass
class Terminal:
    """A pseudo terminal: what is written into `far` can be read of it."""

    near: int
    far: int

    def shown(self) -> list[str]:
        """All that was drawn until the end of a line."""
        text = ""
        while "\n" not in text:
            text += os.read(self.near, 1 << 16).decode()
        return text.replace("\n", "\r").strip("\r").split("\r")


@pytest.fixture(params=[140, 80, 0])
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    near, far = os.openpty()
    ioctl(far, termios.TIOCSWINSZ, struct.pack("4H", 24, request.param, 0, 0))
    yield Terminal(near, far)
    os.close(near)
    os.close(far)


def test_bar_shows_the_newest_values_in_the_width_there_is(terminal: Terminal) -> None:
    now = [100.0]
    columns = os.get_terminal_size(terminal.far).columns
    with os.fdopen(terminal.far, "w", closefd=False) as file:
        bar = Bar(file, clock=lambda: now[0])
        bar(STARTED)
        bar(COMMITTED)
        now[0] += 75
        bar(BATCH)
        bar(STOPPED)
        file.flush()
    last = terminal.shown()[-1]
    assert len(last) <= (columns or 80)
    if columns == 140:
        assert last.startswith("epoch 2/8 batch 14/80 |")
        assert last.endswith(
            "| 0:33 left, loss 0.2500 exact 0.125, 20 samples/s, checkpoint 13, 1:15 old, "
            "4 worker(s), 3 restart(s)"
        )
    else:
        assert last.startswith("2/8 14/80 |")
        assert last.endswith("| 0:33 loss 0.2500 exact 0.125 20/s saved 13 1:15 4w 3r")
