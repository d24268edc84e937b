#!/usr/bin/env bash
# Finding: `rope_scaling` that names its kind by `type` has no effect in models with rope settings
#   per layer type.
# Packages: transformers 5.24.0
# Guess: `type` and `rope_type` are two names of one field, as everywhere else in transformers.
# Observed: Gemma 3 and OLMo 3 merge `rope_scaling` into settings that already say `rope_type`
#   "default". The other name comes later and is not looked at: the factor stands in the config, and
#   the positions are not stretched. In Llama the same settings are linear.
# Matters: A long-context model saved with the older name runs with unstretched positions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import transformers
from transformers import Gemma3TextConfig, LlamaConfig, Olmo3Config

print(f"transformers {transformers.__version__}")


def kind_of(make, name):
    scaling = {name: "linear", "factor": 8.0}
    rope = make(rope_scaling=scaling).rope_parameters
    return rope.get("full_attention", rope)["rope_type"]


classes = (LlamaConfig, Gemma3TextConfig, Olmo3Config)
observed = {
    name: [kind_of(make, name) for make in classes] for name in ("rope_type", "type")
}
expected = {
    "rope_type": ["linear", "linear", "linear"],
    "type": ["linear", "default", "default"],
}

for name, kinds in observed.items():
    for make, kind in zip(classes, kinds, strict=True):
        print(f"{make.__name__}, linear by {name}: rope_type {kind}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
