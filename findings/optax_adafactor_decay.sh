#!/usr/bin/env bash
# Finding: `optax.adafactor(1e-3, weight_decay_rate=0.1)` shrinks a weight by 10 % per step, where
#   `optax.adamw(1e-3, weight_decay=0.1)` shrinks it by 0.01 %.
# Packages: optax 0.2.8, jax 0.10.2
# Guess: The decay is multiplied by the learning rate, as in adamw and lion, and in torch's and
#   transformers' Adafactor.
# Observed: The rate is subtracted as it is, whatever the learning rate, also where a schedule has
#   brought that to 0.
# Matters: A value brought from AdamW takes all weights to nothing within some fifty steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax.numpy as jnp
import optax


def after_one_step(optimizer):
    """A weight of 1 after an update with a gradient of 0."""
    params = {"w": jnp.ones((4, 4))}
    updates, _ = optimizer.update({"w": jnp.zeros((4, 4))}, optimizer.init(params), params)
    return round(float(optax.apply_updates(params, updates)["w"][0, 0]), 6)


observed = {
    "adamw": after_one_step(optax.adamw(1e-3, weight_decay=0.1)),
    "lion": after_one_step(optax.lion(1e-3, weight_decay=0.1)),
    "adafactor": after_one_step(optax.adafactor(1e-3, weight_decay_rate=0.1)),
    "adafactor at rate 0": after_one_step(optax.adafactor(0.0, weight_decay_rate=0.1)),
}
expected = {"adamw": 0.9999, "lion": 0.9999, "adafactor": 0.9, "adafactor at rate 0": 0.9}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
