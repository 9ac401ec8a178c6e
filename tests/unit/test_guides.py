"""The runner of the guides finds what a guide says too much of."""

import subprocess
from pathlib import Path

from tests.guides import missing, script, steps

GUIDE = """
```bash
WORD=here
cd /
```

```python
print("from", "python")
```

```text
from python
```

1. In a list:

   ```bash
   cat <<'END'
   $WORD
   END
   echo "$WORD $PWD"
   ```

   ```text
   here /
   ```
"""


def found(tmp_path: Path, guide: str) -> list[str]:
    file = tmp_path / "guide.md"
    file.write_text(guide)
    wanted = steps(file)
    command = ["bash", "-c", script(wanted, tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return missing(wanted, run.stdout)


def test_guide_that_says_what_happens_is_good(tmp_path: Path) -> None:
    assert found(tmp_path, GUIDE) == []


def test_line_that_was_not_printed_is_found(tmp_path: Path) -> None:
    (told,) = found(tmp_path, GUIDE.replace("here /\n", "there /\n"))
    assert told.startswith("step 2 did not print 'there /'")


def test_lines_in_another_order_are_found(tmp_path: Path) -> None:
    guide = GUIDE.replace("   here /\n", "   here /\n   $WORD\n")
    assert len(found(tmp_path, guide)) == 1


def test_command_that_fails_is_found(tmp_path: Path) -> None:
    (told,) = found(tmp_path, GUIDE.replace("cd /", "cd /missing"))
    assert told.startswith("step 0 has failed")
