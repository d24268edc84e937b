#!/usr/bin/env bash
# Finding: `optax.warmup_constant_schedule(0, peak, warmup_steps=0)` is 0 for ever;
#   `warmup_cosine_decay_schedule` with no warm-up starts at the peak.
# Packages: optax 0.2.8, jax 0.10.2
# Guess: No warm-up means the peak from the first step on, in both.
# Observed: A polynomial schedule of 0 steps stays at its initial value. Only a log line at
#   level INFO says so.
# Matters: A sweep over warm-up steps that includes 0 trains nothing in that arm, with a loss
#   that looks like a plateau.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import optax

constant = optax.warmup_constant_schedule(0.0, 1.0, warmup_steps=0)
linear = optax.linear_schedule(0.0, 1.0, transition_steps=0)
cosine = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=0, decay_steps=100)
observed = {
    "constant": [float(constant(step)) for step in (0, 1, 1000)],
    "linear": [float(linear(step)) for step in (0, 1, 1000)],
    "cosine at 0": float(cosine(0)),
}
expected = {"constant": [0.0] * 3, "linear": [0.0] * 3, "cosine at 0": 1.0}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
