#!/usr/bin/env bash
# Finding: transformers 4.57 takes a config with transformers 5's `rope_parameters` without
#   complaint and rotates with theta 10,000.
# Packages: transformers 4.57.1
# Guess: An unknown field of such weight is understood, or refused, or at least warned about.
# Observed: `rope_parameters` is kept as an attribute that no code reads; `rope_theta` has its
#   default. The model loads, and every position but the first is rotated by the wrong angle.
# Matters: A checkpoint exported by a transformers-5 stack and served by a 4.x stack is silently
#   another model. Write `rope_theta` and `rope_scaling` as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==4.57.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

from transformers import AutoConfig

fields = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
with open("config.json", "w") as file:
    json.dump(fields, file)
config = AutoConfig.from_pretrained(".")
observed = {"rope_theta": config.rope_theta, "rope_parameters": config.rope_parameters}
expected = {"rope_theta": 10000.0, "rope_parameters": fields["rope_parameters"]}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
