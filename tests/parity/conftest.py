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
    return Parity(request.module.SECTION, ROWS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A check that ends with an error before it has compared anything gets a row as well."""
    report = yield
    recorded = ROWS[item.stash.get(FIRST, len(ROWS)) :]
    if report.failed and not any(row.verdict == CHANGED for row in recorded):
        title = item.name.removeprefix("check_").replace("_", " ")
        why = " ".join(str(call.excinfo.value).split())[:200]
        ROWS.append(Row(item.module.SECTION, title, "", "the whole check", CHANGED, None, why))
    return report


def pytest_sessionfinish():
    if file := os.environ.get("PARITY_ROWS"):
        rows = [dataclasses.asdict(row) | {"difference": _rounded(row.difference)} for row in ROWS]
        peers = sorted({row.peer for row in ROWS if row.peer})
        found = {"versions": {peer: version(peer) for peer in peers}, "rows": rows}
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _rounded(difference):
    return None if difference is None else float(f"{difference:.1e}")
