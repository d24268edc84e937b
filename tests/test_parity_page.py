"""docs/parity.md shows what the checks of tests/parity/ have written, with the pinned packages."""

import json
import re
import subprocess
import sys

from doc_code import ROOT


def test_the_page_of_parity_is_current():
    page = ROOT / "tests" / "parity" / "page.py"
    done = subprocess.run([sys.executable, page, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_parity_is_of_the_pinned_packages_and_no_check_failed():
    found = json.loads((ROOT / "docs" / "parity.json").read_text(encoding="utf-8"))
    requirements = (ROOT / "tests" / "parity" / "requirements.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", requirements, re.MULTILINE))
    for peer, version in found["versions"].items():
        assert version.split("+")[0] == pinned[peer], peer
    assert {row["verdict"] for row in found["rows"]} <= {"equal", "departs", "missing"}
