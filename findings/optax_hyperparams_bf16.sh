#!/usr/bin/env bash
# Finding: `optax.inject_hyperparams(optax.adamw)` on bfloat16 parameters gives NaN in the first
#   update.
# Packages: optax 0.2.8, jax 0.10.2
# Guess: It gives what `optax.adamw` gives; hyperparameters are scalars of float32.
# Observed: The hyperparameters take the dtype of the parameters: b2 = 0.999 becomes 1.0 in
#   bfloat16, the bias correction divides by 1 - 1, and every update is NaN.
#   `hyperparam_dtype=jnp.float32` mends it.
# Matters: It is the usual way to log or set the learning rate in a run; in bfloat16 it destroys
#   the weights at once, or with b2 = 0.99 changes the optimizer a little without a sign.
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

params = jnp.ones(2, jnp.bfloat16)
gradient = jnp.full(2, 0.1, jnp.bfloat16)


def first(optimizer):
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return bool(jnp.isfinite(updates).all())


injected = optax.inject_hyperparams(optax.adamw)
float32 = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)
b2 = injected(learning_rate=1e-3).init(params).hyperparams["b2"]
observed = {
    "b2": (float(b2), str(b2.dtype)),
    "adamw is finite": first(optax.adamw(1e-3)),
    "injected is finite": first(injected(learning_rate=1e-3)),
    "float32 is finite": first(float32(learning_rate=1e-3)),
}
expected = {
    "b2": (1.0, "bfloat16"),
    "adamw is finite": True,
    "injected is finite": False,
    "float32 is finite": True,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
