#!/usr/bin/env bash
# Finding: Flax's `LayerNorm` on float32 inputs with mean 10,000 and spread 1 returns values
#   near 1,500 where -1.3 to 1.3 is right.
# Packages: flax 0.12.8, jax 0.10.2
# Guess: A normalised row has variance 1, as with PyTorch's LayerNorm.
# Observed: The default `use_fast_variance=True` computes E[x^2] - E[x]^2; the difference
#   cancels in float32, is clipped at 0, and the row is divided by the square root of epsilon
#   (1e-6). `use_fast_variance=False` is right.
# Matters: The error depends on the ratio of mean to spread. A row with a large common offset
#   comes out scaled up by orders of magnitude, and a ported model differs from its reference in
#   just those rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

x = jnp.array([[10000.0, 10001.0, 10002.0, 10003.0]])


def largest(**options):
    layer = nn.LayerNorm(**options)
    return round(float(jnp.abs(layer.apply(layer.init(jax.random.key(0), x), x)).max()), 2)


observed = {"default": largest(), "use_fast_variance=False": largest(use_fast_variance=False)}
print(observed)
observed["default"] = observed["default"] > 100
expected = {"default": True, "use_fast_variance=False": 1.34}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
