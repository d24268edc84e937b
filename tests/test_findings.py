"""Each script in findings/ stands alone, and docs/surprises.md lists them as they are."""

import re
import subprocess
import sys

import pytest
from doc_code import ROOT

SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))


def program(text: str) -> str:
    """The Python of a script."""
    return re.search(r"<<'PROGRAM'\n(.*)^PROGRAM\n\Z", text, re.MULTILINE | re.DOTALL)[1]


def test_the_page_of_findings_is_current():
    done = subprocess.run(
        [sys.executable, ROOT / "findings" / "index.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_finding_pins_its_packages_and_needs_nothing_of_relax(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    compile(program(text), script.name, "exec")
    assert "relax" not in text.lower()
    lines = re.findall(r"pip\" install --quiet (?:--no-deps )?(.*)", text)
    installed = " ".join(lines).split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in installed)
    named = re.search(r"# Packages: ((?:.*\n#   )*.*)", text)[1].replace("\n#   ", " ")
    assert named == ", ".join(installed).replace("==", " ")
    assert all(len(line) <= 100 for line in text.splitlines()[1:] if "pip" not in line)
