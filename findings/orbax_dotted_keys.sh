#!/usr/bin/env bash
# Finding: Two leaves whose key paths are equal once joined by dots are written to one place:
#   orbax restores the same array for both.
# Packages: orbax-checkpoint 0.12.8, jax 0.10.2
# Guess: The keys "a.b" and "a" -> "b" are two leaves of the tree, each saved and restored.
# Observed: Arrays are stored under the dotted name. The save succeeds, the restored tree has
#   the right structure, and both leaves hold one of the two arrays.
# Matters: Trees that mix flat names as PyTorch has them with nested ones lose weights silently.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import os
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

tree = {"a": {"b": jnp.zeros(1)}, "a.b": jnp.ones(1)}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(os.path.abspath("saved"), tree)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(os.path.abspath("saved"))
nested, flat = float(restored["a"]["b"][0]), float(restored["a.b"][0])
print("saved 0 and 1, restored", nested, "and", flat)
observed = {"keys": sorted(restored), "equal": nested == flat}
expected = {"keys": ["a", "a.b"], "equal": True}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
