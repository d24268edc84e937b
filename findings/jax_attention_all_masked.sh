#!/usr/bin/env bash
# Finding: A query that may attend to nothing gets the mean of all values from jax's
#   `dot_product_attention`, and zeros from torch's.
# Packages: jax 0.10.2, torch 2.13.0
# Guess: Zeros, or NaN, in both: nothing was allowed.
# Observed: jax replaces masked scores by one large negative number, so a row of them is uniform
#   and every masked value, padding included, flows into the result and gets gradients.
# Matters: Padded or separated rows differ between a jax and a torch implementation, and what
#   was masked is trained, where the result is not masked again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import torch

values = jnp.arange(4.0).reshape(1, 2, 1, 2)  # [batch, time, heads, size]
mask = jnp.zeros((1, 1, 2, 2), bool)
result = jax.nn.dot_product_attention(0 * values, 0 * values, values, mask=mask)
theirs = torch.arange(4.0).reshape(1, 1, 2, 2)  # [batch, heads, time, size]
other = torch.nn.functional.scaled_dot_product_attention(
    0 * theirs, 0 * theirs, theirs, attn_mask=torch.zeros(2, 2, dtype=torch.bool)
)
observed = {"jax": result[0, :, 0].tolist(), "torch": other[0, 0].tolist()}
expected = {"jax": [[1.0, 2.0]] * 2, "torch": [[0.0, 0.0]] * 2}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
