"""The table of docs/metrics.md, with which the metrics of runs are compared."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
NAMES = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
_PATTERNS = [re.sub(r"<\w+>", "[^/]+", re.escape(name)) for name in NAMES]
_ANY = re.compile(rf"(eval_(\w+_)??)?({'|'.join(_PATTERNS)})")


def undocumented(records: Iterable[dict]) -> set[str]:
    """The names in lines of metrics.jsonl that the table does not have."""
    return {name for record in records for name in record if not _ANY.fullmatch(name)}
