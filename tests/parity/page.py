"""Writes docs/parity.md from docs/parity.json, which the checks of this folder write.

`python tests/parity/page.py` writes it; with `--check` it fails where the page is not current.
"""

import json
import math
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROWS, PAGE = DOCS / "parity.json", DOCS / "parity.md"
INTRODUCTION = """\
# Parity with public packages

ReLax's own functions beside those of the packages that it is compared with, on the same tensors,
texts or models, on the CPU in float32: {versions}.

```
python tests/parity/run.py
```

makes an environment with these packages, runs all comparisons and writes this page. For a new
release, change its line in `tests/parity/requirements.txt` and run it again. A departure is checked
too: it fails once the package behaves like ReLax, or in a third way.

Of {total} comparisons {equal} are [equal](#equal) and {departs} [depart on purpose](#departures).
A difference is a fraction of the largest value of the package, and is the rounding of float32.
"""
HEADS = {
    "changed": ("Changed", "These failed: a package or ReLax has changed.", "What happened"),
    "equal": ("Equal", "", "Largest difference"),
    "departs": (
        "Departures",
        "ReLax differs on purpose; what is checked is that it still does.",
        "What differs, and why",
    ),
    "missing": (
        "Missing",
        "The package has it, ReLax has not. Where there is a reason or another way, it is given.",
        "",
    ),
}


def page(found: dict) -> str:
    """The page: changed (if any), equal, departures, missing, each with a table per section."""
    rows = found["rows"]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in HEADS}
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    total = len(rows) - counts["missing"]
    parts = [INTRODUCTION.format(versions=versions, total=total, **counts)]
    for verdict, (title, sentence, last) in HEADS.items():
        chosen = [row for row in rows if row["verdict"] == verdict]
        if not chosen:
            continue
        parts.append(f"## {title}\n" + (f"\n{sentence}\n" if sentence else ""))
        for section in sorted({row["section"] for row in chosen}):
            lines = [row for row in chosen if row["section"] == section]
            body = _list(lines) if verdict == "missing" else _table(last, lines)
            parts.append(f"### {section}{_SUFFIX[verdict]}\n\n{body}")
    return "\n".join(parts)


# Anchors of one page must differ.
_SUFFIX = {"changed": ": changed", "equal": "", "departs": ": departures", "missing": ": missing"}


def _list(rows: list[dict]) -> str:
    """What has the same advice makes one line."""
    subjects: dict[tuple, list[str]] = {}
    for row in rows:
        subjects.setdefault((row["peer"], row["why"]), []).append(row["subject"])
    return "".join(
        f"- {', '.join(names)} ({peer}){f': {why}' if why else ''}.\n"
        for (peer, why), names in subjects.items()
    )


def _table(last: str, rows: list[dict]) -> str:
    """What is said of the same subject makes one line."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row["subject"], row["peer"], "" if row["verdict"] == "equal" else row["why"]
        groups.setdefault(key, []).append(row)
    lines = [["Subject", "Package", "Compared", last], ["---"] * 4]
    for (subject, peer, why), group in groups.items():
        compared = "; ".join(dict.fromkeys(row["compared"] for row in group))
        ending = why or _bound(max(row["difference"] for row in group))
        lines.append([cell.replace("|", "\\|") for cell in (subject, peer, compared, ending)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _bound(difference: float) -> str:
    """The power of ten that the difference stays below: its digits are the machine's.

    >>> _bound(3e-8), _bound(0.0)
    ('below 1e-7', '0')
    """
    return f"below 1e{math.floor(math.log10(difference)) + 1}" if difference else "0"


if __name__ == "__main__":
    text = page(json.loads(ROWS.read_text(encoding="utf-8")))
    if sys.argv[1:] == ["--check"]:
        current = PAGE.read_text(encoding="utf-8") == text
        sys.exit(0 if current else f"{PAGE} is not current: run {__file__}")
    PAGE.write_text(text, encoding="utf-8")
