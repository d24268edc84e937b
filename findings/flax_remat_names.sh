#!/usr/bin/env bash
# Finding: Wrapping an unnamed Linen layer in `nn.remat` renames its parameters and gives them
#   other initial values.
# Packages: flax 0.12.8, jax 0.10.2
# Guess: Rematerialisation trades time for memory and changes nothing else.
# Observed: The automatic name is that of the wrapped class: Block_0 becomes CheckpointBlock_0,
#   and since names enter the random keys, the same seed initialises other weights.
# Matters: Turning on gradient checkpointing breaks loading of earlier weights and makes two
#   runs with one seed incomparable. Name such layers.
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


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


class Model(nn.Module):
    layer: type
    name_: str | None = None

    @nn.compact
    def __call__(self, x):
        return self.layer(name=self.name_)(x)


def init(*arguments):
    return Model(*arguments).init(jax.random.key(0), jnp.ones((1, 2)))["params"]


plain, remat = init(Block), init(nn.remat(Block))
named, named_remat = init(Block, "block"), init(nn.remat(Block), "block")
kernel = plain["Block_0"]["Dense_0"]["kernel"]
observed = {
    "names": (list(plain), list(remat)),
    "same values": bool((kernel == remat["CheckpointBlock_0"]["Dense_0"]["kernel"]).all()),
    "same values where named": bool(
        (named["block"]["Dense_0"]["kernel"] == named_remat["block"]["Dense_0"]["kernel"]).all()
    ),
}
expected = {
    "names": (["Block_0"], ["CheckpointBlock_0"]),
    "same values": False,
    "same values where named": True,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
