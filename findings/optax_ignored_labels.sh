#!/usr/bin/env bash
# Finding: For `softmax_cross_entropy_with_integer_labels` the label -100 is NaN and the label
#   -1 is the last class.
# Packages: optax 0.2.8, jax 0.10.2
# Guess: Labels outside the classes are ignored, as PyTorch's -100 is, or refused.
# Observed: -1 counts from the end like a Python index, so padding with -1 trains the last token
#   of the vocabulary; -100 is out of range and gives NaN, also where a mask multiplies it by 0
#   afterwards.
# Matters: A port from PyTorch either has NaN, or, with -1, a model that learns to write the
#   last (often a reserved) token, with a plausible loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax.numpy as jnp
import optax

logits = jnp.array([[2.0, 1.0, 0.0]] * 3)
labels = jnp.array([-100, -1, 2])
losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
print("losses of the labels -100, -1 and 2:", losses)
observed = {
    "-100 is NaN": bool(jnp.isnan(losses[0])),
    "-1 is the last class": bool(losses[1] == losses[2]),
    "masked sum is NaN": bool(jnp.isnan((losses * jnp.array([0, 0, 1])).sum())),
}
expected = dict.fromkeys(observed, True)

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
