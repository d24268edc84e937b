#!/usr/bin/env bash
# Finding: `jax.random.categorical` draws the token whose logit is NaN every time, and token 0
#   where all logits are -inf.
# Packages: jax 0.10.2
# Guess: NaN in the logits gives an error or something that shows, as torch.multinomial raises.
# Observed: The draw is an argmax over logits plus noise, and argmax prefers NaN; `top_k` puts
#   NaN first as well. The result is a valid token id.
# Matters: A broken layer writes fluent-looking ids of one token; a mask that leaves nothing
#   writes token 0, often a padding or BOS token. Test logits for NaN before drawing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp

keys = jax.random.split(jax.random.key(0), 200)


def drawn(logits):
    tokens = jax.vmap(lambda key: jax.random.categorical(key, jnp.array(logits)))(keys)
    return sorted(set(tokens.tolist()))


nan, inf = float("nan"), float("inf")
observed = {
    "three equal logits": drawn([0.0, 0.0, 0.0]),
    "one is NaN": drawn([0.0, nan, 0.0]),
    "all are -inf": drawn([-inf, -inf, -inf]),
    "top 1 beside NaN": jax.lax.top_k(jnp.array([1.0, nan, 3.0]), 1)[1].tolist(),
}
expected = {
    "three equal logits": [0, 1, 2],
    "one is NaN": [1],
    "all are -inf": [0],
    "top 1 beside NaN": [1],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
