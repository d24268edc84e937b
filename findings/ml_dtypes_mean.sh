#!/usr/bin/env bash
# Finding: numpy's mean of 70,000 bfloat16 ones is 0.0037.
# Packages: ml_dtypes 0.6.0, numpy 2.4.6
# Guess: 1.0: numpy sums float16 in float32 for a mean, and jax does so for bfloat16.
# Observed: numpy knows bfloat16 only as a foreign type and accumulates in it: the sum stops at
#   256, where adding 1 no longer changes it. `mean(dtype=np.float32)` is right.
# Matters: Losses, rewards or weight statistics taken on the host from bfloat16 arrays are wrong
#   by orders of magnitude once there are more than a few hundred values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import ml_dtypes
import numpy as np

ones = np.ones(70000, ml_dtypes.bfloat16)
observed = {
    "bfloat16 sum": float(ones.sum()),
    "bfloat16 mean": round(float(ones.mean()), 4),
    "with dtype=float32": float(ones.mean(dtype=np.float32)),
    "float16 mean": float(np.ones(70000, np.float16).mean()),
}
expected = {
    "bfloat16 sum": 256.0,
    "bfloat16 mean": 0.0037,
    "with dtype=float32": 1.0,
    "float16 mean": 1.0,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
