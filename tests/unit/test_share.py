"""What workers of unlike machines are told."""

from pathlib import Path

import pytest

from tests.fakes import RUN
from trm_dist.checkpoint.runs import claim
from trm_dist.checkpoint.store import LocalStore
from trm_dist.share import differences, why_unseen

HERE = {"host": "a", "cpu_capability": "AVX2", "threads": "1"}


def test_like_workers_have_no_differences() -> None:
    assert differences([HERE, HERE | {"host": "b"}]) == []


def test_each_difference_of_a_node_is_told_once() -> None:
    other = HERE | {"host": "b", "cpu_capability": "AVX512"}

    lines = differences([HERE, HERE, other, other, HERE | {"threads": "2"}])

    assert len(lines) == 2
    assert lines[0].startswith(
        "cpu_capability is AVX512 in worker 2 on b and AVX2 in worker 0 on a"
    )
    assert lines[0].endswith("--cpu-capability makes them alike")
    assert lines[1].startswith("threads is 2 in worker 4 on a and 1 in worker 0 on a")


def test_node_that_sees_the_claim_of_the_writer_has_nothing_to_tell(tmp_path: Path) -> None:
    run = claim(LocalStore(str(tmp_path)), RUN, "host:1")

    assert not why_unseen(run, str(tmp_path), 0.0)


def test_store_that_is_another_one_here_is_told(tmp_path: Path) -> None:
    run = claim(LocalStore(str(tmp_path / "there")), RUN, "host:1")

    assert "does not see what host has written" in why_unseen(run, str(tmp_path / "here"), 0.0)


def test_store_that_is_away_from_a_node_that_does_not_write_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert not why_unseen(RUN, str(tmp_path / "loop" / "run"), 0.0)

    assert "cannot read it" in caplog.text
