"""The guides' commands, as they stand there, and what the guides say that they print."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = "-- end of step {} --"


@dataclass(frozen=True)
class Step:
    """A block of commands and the block of output that follows it, if there is one."""

    commands: str
    expected: tuple[str, ...]
    """Each is a part of a line; the lines come in this order."""


def steps(guide: Path) -> list[Step]:
    """The commands of a guide in their order; Python is what a shell would hand to python."""
    found: list[Step] = []
    for indent, language, body in blocks(guide):
        text = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        if language == "bash":
            found.append(Step(text, ()))
        elif language == "python":
            found.append(Step(f"python - <<'END'\n{text}END\n", ()))
        elif language == "text" and found:
            found[-1] = Step(found[-1].commands, tuple(each.strip() for each in text.splitlines()))
    return found


def blocks(guide: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks of a guide: indentation, language, text."""
    return _FENCE.findall(guide.read_text())


def script(of: list[Step], directory: Path) -> str:
    """One shell script of all steps: variables and directories last from step to step."""
    parts = [f"set -euo pipefail; exec 2>&1; cd '{directory}'\n"]
    for number, step in enumerate(of):
        parts += [step.commands, f"echo '{_MARK.format(number)}'\n"]
    return "".join(parts)


def missing(of: list[Step], output: str) -> list[str]:
    """What the script should have printed and has not, step by step."""
    found = []
    for number, step in enumerate(of):
        printed, mark, output = output.partition(_MARK.format(number))
        if not mark:
            return [*found, f"step {number} has failed:\n{step.commands}\n{printed}"]
        lines = iter(printed.splitlines())
        found += [
            f"step {number} did not print {wanted!r}:\n{step.commands}\n{printed}"
            for wanted in step.expected
            if not any(wanted in line for line in lines)
        ]
    return found
