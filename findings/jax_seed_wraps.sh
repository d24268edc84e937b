#!/usr/bin/env bash
# Finding: Seeds and ids above 32 bits wrap without a word: `jax.random.key(2**32)` is `key(0)`,
#   and an int64 array of numpy loses its upper half.
# Packages: jax 0.10.2
# Guess: An error, as for the Python integer `jnp.asarray(2**31)`, which raises OverflowError.
# Observed: With 64 bits off (the default) a seed is taken modulo 2**32 and
#   `jnp.asarray(np.array([2**32 + 7]))` is [7]. A float given to `fold_in` is cut to an integer
#   too.
# Matters: Seeds made from hashes or nanoseconds collide, and ids or hashes that travel as
#   arrays (which row is this?) point to other rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("error")


def same(a, b):
    return bool((jax.random.key_data(a) == jax.random.key_data(b)).all())


key = jax.random.key(0)
try:
    python = int(jnp.asarray(2**31))
except OverflowError:
    python = "OverflowError"
observed = {
    "key(2**32) is key(0)": same(jax.random.key(2**32), key),
    "numpy 2**32 + 7": int(jnp.asarray(np.array([2**32 + 7]))[0]),
    "Python 2**31": python,
    "fold_in 1.5 is 1": same(jax.random.fold_in(key, 1.5), jax.random.fold_in(key, 1)),
}
expected = {
    "key(2**32) is key(0)": True,
    "numpy 2**32 + 7": 7,
    "Python 2**31": "OverflowError",
    "fold_in 1.5 is 1": True,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
