#!/usr/bin/env bash
# Finding: `jax.random.split(key, n)[i]` is the same key as `jax.random.fold_in(key, i)`, for
#   every n.
# Packages: jax 0.10.2
# Guess: Splitting in two and splitting in three give unrelated keys, and folding a number in a
#   third kind.
# Observed: Since the partitionable generator is the default, all of them are one sequence: the
#   first keys of split(key, 2) and split(key, 3) are equal, and equal to fold_in(key, 0).
# Matters: Code that splits a key for dropout and folds a step into the same key for sampling
#   draws the same numbers twice. Fold a constant for the purpose in first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax


def data(key):
    return jax.random.key_data(key).tolist()


key = jax.random.key(0)
two, three = jax.random.split(key, 2), jax.random.split(key, 3)
folded = [data(jax.random.fold_in(key, i)) for i in range(3)]
observed = {
    "split 2 begins split 3": data(two) == data(three)[:2],
    "fold_in is split": folded == data(three),
}
expected = dict.fromkeys(observed, True)

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
