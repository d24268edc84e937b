#!/usr/bin/env bash
# Finding: `truncate` of YaRN has no effect where rope settings are per layer type.
# Packages: transformers 5.24.0, torch 2.13.0
# Guess: It is read with the other settings of its layer type: frequencies differ as they do in a
#   model with one set of rope settings.
# Observed: `factor`, `beta_fast` and the others are read from the layer type's settings, `truncate`
#   from the object around them, which does not have it. The frequencies are the truncated ones.
# Matters: A model trained with unrounded bounds gets other angles, and only in this form.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import transformers
from transformers import LlamaConfig, Olmo3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

print(f"transformers {transformers.__version__}")
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def alone(**more):
    config = LlamaConfig(rope_parameters=YARN | more, max_position_embeddings=2048)
    return ROPE_INIT_FUNCTIONS["yarn"](config)[0]


def per_layer_type(**more):
    ropes = {FULL: YARN | more, SLIDING: PLAIN}
    config = Olmo3Config(rope_parameters=ropes, max_position_embeddings=2048)
    return ROPE_INIT_FUNCTIONS["yarn"](config, layer_type=FULL)[0]


observed = {}
for name, frequencies in (("one set", alone), ("per layer type", per_layer_type)):
    change = (frequencies() - frequencies(truncate=False)).abs().max().item()
    print(f"{name}: truncate=False changes the frequencies by {change:.4f}")
    observed[name] = change > 0
expected = {"one set": True, "per layer type": False}
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
