"""Write docs/surprises.md from the comments at the head of each script in this folder.

`python findings/index.py` writes the page, `python findings/index.py --check` fails where it is
not current.
"""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "surprises.md"
FIELDS = ("Finding", "Packages", "Guess", "Observed", "Matters")
INTRODUCTION = """\
# Surprises

What public packages do where post-training meets them and a good guess would be wrong, each at a
pinned version. Every entry is the name of a script in `findings/`, which says at its top what one
would guess, what happens and why it matters. The script installs the packages into a virtual
environment of its own, shows the behaviour without ReLax on valid input, and fails once a release
behaves otherwise. `PYTHON` names the interpreter (`python3.11` by default).

```
bash findings/orbax_best_nan.sh
```

This page is generated from the scripts by `python findings/index.py`.
"""


def read_head(path: Path) -> dict[str, str]:
    """Return the fields of a script's leading comment; their order and names are fixed."""
    lines = re.match(r"#!.*\n((?:#.*\n)+)", path.read_text())
    text = lines[1] if lines else ""
    joined = re.sub(r"\n#   ", " ", text)
    head = dict(line[2:].split(": ", 1) for line in joined.splitlines())
    if tuple(head) != FIELDS:
        raise ValueError(f"{path.name} must begin with the comments {FIELDS}, has {tuple(head)}.")
    return head


def page() -> str:
    """Return the page: for each package the findings, one sentence and the versions."""
    groups: dict[str, list[str]] = {}
    for path in sorted(FOLDER.glob("*.sh")):
        head = read_head(path)
        package = head["Packages"].split(" ")[0]
        line = f"- **{path.stem}** ({head['Packages']}). {head['Finding']}\n"
        groups.setdefault(package, []).append(line)
    parts = [f"## {package}\n\n{''.join(lines)}" for package, lines in sorted(groups.items())]
    return "\n".join((INTRODUCTION, *parts))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is not current: run {__file__}")
    PAGE.write_text(page())
