"""What the documents say is there: links, flags, messages."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from tests.guides import ROOT, blocks
from trm_dist.cli import main
from trm_dist.config import Config
from trm_dist.export import ExportArguments
from trm_dist.inspection import COMMANDS
from trm_dist.launch.job import LaunchConfig
from trm_dist.predict import PredictArguments

DOCUMENTS = sorted(
    each
    for pattern in ("*.md", "launch/*.md", "trm_dist/*.md", "tests/*.md", "k8s/*.md", "docker/*.md")
    for each in ROOT.glob(pattern)
)
TROUBLESHOOTING = ROOT / "launch/troubleshooting.md"

_OF_OTHERS = {
    *("--nproc_per_node", "--nproc-per-node", "--max-restarts", "--rdzv-id"),  # torchrun
    *("--gigabytes", "--kind", "--rounds", "--without-peers"),  # tests.benchmarks.large_text
    *("--help", "--data", "--learning-rate", "--clear", "--no-compile"),
}
"""Flags of torchrun and of measurements, and other spellings."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: str(each.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize(
    "guide", ["checkpoint_guide.md", "checkpoint_guide.uk.md", "data.md", "troubleshooting.md"]
)
def test_flags_that_guides_name_exist(guide: str) -> None:
    text = (ROOT / "launch" / guide).read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    assert {each.replace("_", "-") for each in named - _OF_OTHERS} <= known_flags()


def test_commands_and_targets_that_documents_name_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--help"])
    commands = set(re.findall(r"[a-z]+", capsys.readouterr().out.partition("}")[0]))
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(part for each in DOCUMENTS for part in code_of(each.read_text()))
    assert set(re.findall(r"(?<!-m )\btrm_dist ([a-z]+)", code)) <= commands
    assert set(re.findall(r"^[ `]*make ([a-z0-9-]+)", code, re.MULTILINE)) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: str(each.relative_to(ROOT)))
def test_tests_that_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    known = "".join(each.read_text() for each in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in known, name
    for path in re.findall(r"`((?:[\w/]+/)?test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(path.removeprefix("tests/"))), path


def test_messages_of_the_troubleshooting_guide_are_in_the_source() -> None:
    known = messages()
    quoted = [line for _, kind, text in blocks(TROUBLESHOOTING) for line in text.splitlines()]
    assert len(quoted) > 50
    assert [line for line in quoted if not is_message(line, known)] == []


def links(document: Path) -> list[str]:
    """Relative targets of links and pictures."""
    text = re.sub(r"^( *)```.*?^\1```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    return [each for each in found if not re.match("[a-z]+:", each)]


def code_of(text: str) -> list[str]:
    """Code spans, indented blocks and the commands of fenced ones."""
    fenced = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`[^`\n]+`|^    .*$", text, re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def known_flags() -> set[str]:
    kinds = [
        LaunchConfig,
        PredictArguments,
        ExportArguments,
        *(each for each, _ in COMMANDS.values()),
    ]
    names = set(Config().flat()) | {each.name for kind in kinds for each in fields(kind)}
    return {"--" + each.replace("_", "-") for each in names}


def messages() -> list[str]:
    """Every text in the source; what is put in at run time is a NUL."""
    found = []
    for file in (ROOT / "trm_dist").rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
        for node in [each for each in ast.walk(tree) if id(each) not in docstrings]:
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-+.\d]*[sdfg]", "\0", node.value))
    return found


def is_message(line: str, known: list[str]) -> bool:
    """Whether one text of the source has all parts of a quoted line, in their order."""
    parts = [re.escape(each.strip()) for each in line.split("...") if each.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return bool(parts) and any(pattern.search(each) for each in known)
