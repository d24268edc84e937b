#!/usr/bin/env bash
# Finding: A config with `rope_parameters` and a `rope_scaling` beside it loses
#   `rope_parameters` whole, rope_theta included.
# Packages: transformers 5.24.0
# Guess: The two are merged, or the newer field wins: theta stays 500,000.
# Observed: `rope_scaling` replaces `rope_parameters`; theta falls to the model's default of
#   10,000 unless `rope_theta` stands at the top level too. Without `rope_scaling`, a top-level
#   `rope_theta` is the one that is ignored. Nothing is said.
# Matters: A directory written so that transformers 4 and 5 both read it must repeat rope_theta
#   at the top level, or every position is rotated by the wrong angle.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from transformers import LlamaConfig

new = {"rope_type": "default", "rope_theta": 5e5}
old = {"rope_type": "linear", "factor": 2.0}


def theta(**fields):
    return LlamaConfig(**fields).rope_parameters["rope_theta"]


observed = {
    "rope_parameters": theta(rope_parameters=dict(new)),
    "and rope_scaling": theta(rope_parameters=dict(new), rope_scaling=dict(old)),
    "and rope_scaling, rope_theta": theta(
        rope_parameters=dict(new), rope_scaling=dict(old), rope_theta=5e5
    ),
    "and rope_theta 1e6": theta(rope_parameters=dict(new), rope_theta=1e6),
}
expected = {
    "rope_parameters": 5e5,
    "and rope_scaling": 10000.0,
    "and rope_scaling, rope_theta": 5e5,
    "and rope_theta 1e6": 5e5,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
