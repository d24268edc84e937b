#!/usr/bin/env bash
# Finding: `jax.random.categorical` on bfloat16 logits prefers low token ids: of 1,000 equally
#   likely tokens the first 100 get half of the draws, and the last 100 next to none.
# Packages: jax 0.10.2
# Guess: The logits are rounded to bfloat16 and the draw is from their softmax.
# Observed: The Gumbel noise has the dtype of the logits, so a thousand tokens share some hundred
#   values of it, and argmax takes the first of those that tie. Tokens with a probability below
#   about a thousandth never come. Logits cast to float32 are drawn evenly.
# Matters: A sampler on the logits of a bfloat16 model is biased towards low token ids, and the
#   log-probabilities that reinforcement learning takes from the same logits do not show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp


def share(dtype, first, last):
    """The share of the draws among 1,000 equally likely tokens that falls on some of them."""
    drawn = jax.random.categorical(jax.random.key(0), jnp.zeros((4000, 1000), dtype))
    return float(((drawn >= first) & (drawn < last)).mean())


def rare(dtype):
    """How many of 20,000 draws are one of 100 tokens that together have probability 0.005."""
    logits = jnp.log(jnp.array([0.995] + [0.005 / 100] * 100)).astype(dtype)
    return int((jax.random.categorical(jax.random.key(0), logits, shape=(20_000,)) > 0).sum())


observed = {}
for dtype in (jnp.float32, jnp.bfloat16):
    parts = share(dtype, 0, 100), share(dtype, 900, 1000)
    observed[dtype.__name__] = parts, rare(dtype)
    print(f"{dtype.__name__}: first 100 {parts[0]:.3f}, last 100 {parts[1]:.3f}, ", end="")
    print(f"rare tokens {rare(dtype)} of 20,000, 100 expected")
(even, some), (biased, none) = observed["float32"], observed["bfloat16"]
same = all(0.08 < part < 0.12 for part in even) and 60 < some < 140
same = same and biased[0] > 0.4 and biased[1] < 0.01 and none == 0
sys.exit(0 if same else "the behaviour has changed")
PROGRAM
