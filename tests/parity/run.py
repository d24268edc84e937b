"""Compares ReLax with public packages and writes docs/parity.json and docs/parity.md.

    python tests/parity/run.py                   everything, in minutes
    python tests/parity/run.py check_policy.py   a part, with any arguments of pytest
    python tests/parity/run.py --env DIR ...     in an environment of your choice

The packages of `requirements.txt` live in an environment of their own, by default `.venv/parity`.
It is made on the first run, and brought up to date when that file has changed. A part replaces its
own rows; if a package has another version by then, it drops the others.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".venv" / "parity", metavar="DIR")
    options, rest = parser.parse_known_args(argv)
    python = prepare(options.env.absolute())
    settings = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"PARITY_ROWS": str(ROOT / "docs" / "parity.json")}
    settings |= {"PARITY_KEEP": "1"} if rest else {}
    command = [python, "-m", "pytest", "-c", HERE / "pytest.ini", *rest]
    code = subprocess.run(command, cwd=HERE, env=os.environ | settings).returncode
    subprocess.run([sys.executable, HERE / "page.py"], check=True)
    return code


def prepare(env: Path) -> Path:
    """Makes the environment hold what `requirements.txt` says; returns its interpreter."""
    python, installed = env / "bin" / "python", env / "parity-requirements.txt"
    if not python.exists():
        venv.create(env, with_pip=True)
    if not installed.exists() or installed.read_bytes() != REQUIREMENTS.read_bytes():
        packages = ["-r", REQUIREMENTS, "-e", ROOT]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        shutil.copyfile(REQUIREMENTS, installed)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
