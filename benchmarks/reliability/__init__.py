"""Campaigns against the promises of docs/resume.md; docs/reliability.md has their figures.

Each module is a program: `python -m benchmarks.reliability.kills --help`. They start real runs as
the tests do, with the tests' own helpers.
"""

import os
import sys
import tempfile
from pathlib import Path

# Before jax is imported, and for every run that is started from here.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "relax-reliability-jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
