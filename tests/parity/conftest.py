"""Checks ask for `parity`; what they record is written to the file that run.py names."""

import dataclasses
import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from compare import CHANGED, Parity, Row

ROWS: list[Row] = []
FIRST = pytest.StashKey[int]()


@pytest.fixture
def parity(request):
    request.node.stash[FIRST] = len(ROWS)
    return Parity(request.module.SECTION, ROWS, request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A check that ends with an error before it has compared anything gets a row as well."""
    report = yield
    recorded = ROWS[item.stash.get(FIRST, len(ROWS)) :]
    if report.failed and not any(row.verdict == CHANGED for row in recorded):
        title = item.name.removeprefix("check_").replace("_", " ")
        why = " ".join(str(call.excinfo.value).split())[:200]
        place = item.module.SECTION, title, "", "the whole check"
        ROWS.append(Row(*place, CHANGED, None, why, item.nodeid))
    return report


def pytest_sessionfinish():
    """Replaces the rows of the checks that ran; a run of everything leaves no others."""
    if not (file := os.environ.get("PARITY_ROWS")):
        return
    rows = [dataclasses.asdict(row) | {"difference": _rounded(row.difference)} for row in ROWS]
    versions = {peer: version(peer) for peer in {row.peer for row in ROWS if row.peer}}
    if os.environ.get("PARITY_KEEP"):
        old = json.loads(Path(file).read_text(encoding="utf-8"))
        current = all(versions.get(p, v) == v for p, v in old["versions"].items())
        new = {row["check"] for row in rows}
        kept = [row for row in old["rows"] if row["check"] not in new] if current else []
        rows, versions = kept + rows, (old["versions"] if current else {}) | versions
    # In the order of the files and of what is in them, in pieces or at once.
    rows.sort(key=lambda row: row["check"].partition("::")[0])
    found = {"versions": dict(sorted(versions.items())), "rows": rows}
    Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _rounded(difference):
    return None if difference is None else float(f"{difference:.1e}")
