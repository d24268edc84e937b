#!/usr/bin/env bash
# Finding: every program that jax compiles for the CPU holds about six memory mappings of the
#   process while its function lives, however small it is, and Linux grants 65,530 by default.
# Packages: jax 0.10.2, jaxlib 0.10.2
# Guess: Compiled programs cost some memory; how many of them a process has does not matter.
# Observed: 300 small programs add some 1,800 lines to /proc/self/maps. They go with their
#   functions, or with `jax.clear_caches()` while the functions live on.
# Matters: A process that compiles some ten thousand programs, as a test suite of a jax project or
#   a service with many shapes does, comes to the kernel's limit (vm.max_map_count) with gigabytes
#   of memory free, and is ended by a signal without a Python exception. Count, and clear.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import gc
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

COUNT = 300


def mappings():
    return len(Path("/proc/self/maps").read_text().splitlines())


def compiled(number):
    function = jax.jit(lambda x: jnp.sin(x * number) @ x + number)
    function(jnp.ones((4, 4)))
    return function


compiled(-1)
before = mappings()
functions = [compiled(number) for number in range(COUNT)]
with_programs = mappings()
jax.clear_caches()
gc.collect()
cleared = mappings()
each = (with_programs - before) / COUNT
print(f"{before}, with {COUNT} programs {with_programs} ({each:.1f} each), cleared {cleared}")
same = 4 < each < 10 and cleared - before < COUNT and len(functions) == COUNT
sys.exit(0 if same else "the behaviour has changed")
PROGRAM
