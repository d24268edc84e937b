#!/usr/bin/env bash
# Finding: `rope_theta` of an OLMo 3 config in the old form does not reach the layers with a
#   window.
# Packages: transformers 5.24.0
# Guess: `rope_theta` at the top level, as transformers 4 wrote it, is the base of all layers, as
#   it was in transformers 4.
# Observed: The full layers take it, and the sliding ones fall to the class's default of 500,000.
#   Nothing is said.
# Matters: A model of another base, trained and saved with transformers 4, computes other logits in
#   three of four layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import transformers
from transformers import Olmo3Config

print(f"transformers {transformers.__version__}")
ropes = Olmo3Config(num_hidden_layers=4, rope_theta=10000.0).rope_parameters
observed = {kind: rope["rope_theta"] for kind, rope in ropes.items()}
expected = {"full_attention": 10000.0, "sliding_attention": 500000.0}

for kind, theta in observed.items():
    print(f"rope_theta 10000 gives {kind}: {theta}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
