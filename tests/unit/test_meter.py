"""Long encodings tell how far they are: a bar where a person looks, lines elsewhere."""

import io
import logging
import threading
import time
from contextlib import redirect_stderr, suppress

import pytest

from trm_dist.data.meter import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_which_goes_and_starts_no_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    threads = threading.active_count()
    with (
        redirect_stderr(Terminal()) as terminal,
        suppress(ValueError),
        Meter("data.jsonl", 400, "bytes") as tell,
    ):
        tell(100)
        assert not terminal.getvalue(), "what is short shows nothing"
        time.sleep(1.1)
        tell(200)
        assert threading.active_count() == threads, "workers may be forked from here"
        raise ValueError
    shown = terminal.getvalue()
    assert "encoding data.jsonl:  50%" in shown
    assert "200/400" in shown
    assert not shown.rsplit("\r", 1)[1], "the line is free again"
    assert not caplog.text


def test_elsewhere_there_are_lines_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Meter("a", 400, "bytes", every_s=0) as tell, Meter("b", None, "puzzles") as seldom:
        tell(300)
        seldom(1)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "encoding a: 300 bytes (75 %)"
    ]
    assert "encoding a: 300 bytes (75 %), " in caplog.text
