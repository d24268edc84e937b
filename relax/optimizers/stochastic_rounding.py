"""Parameters in bfloat16 that small updates do not pass by."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundingState(NamedTuple):
    """State of `stochastic_rounding`: that of the optimizer within, and the updates made."""

    inner: Any
    count: jax.Array


def stochastic_rounding(
    optimizer: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformation:
    """Rounds updated bfloat16 parameters up or down at random, right in the mean.

    A bfloat16 number has 8 bits. An update that is less than half of the last one of them is lost
    when it is rounded to the nearest: at a weight of 0.02 that is any below 3e-5, which most of
    fine-tuning is. Here the weight moves by the whole last bit, and does so with a probability of
    the share of it that the update is. Parameters of other dtypes are left alone.

    Gupta et al., Deep Learning with Limited Numerical Precision, 2015, section 3.

    Args:
      optimizer: whose updates are float32 (see `relax.optimizers.optimizers`).
      seed: of the randomness; the same in every run.
    """

    def init(params):
        return RoundingState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        updates, inner = optimizer.update(updates, state.inner, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, tree = jax.tree.flatten(params)
        steps = [
            _rounded_step(p, u, jax.random.fold_in(key, i)) if p.dtype == jnp.bfloat16 else u
            for i, (p, u) in enumerate(zip(leaves, tree.flatten_up_to(updates), strict=True))
        ]
        return tree.unflatten(steps), RoundingState(inner, state.count + 1)

    return optax.GradientTransformation(init, update)


def _rounded_step(param, step, key):
    """The float32 step to a neighbour of param + step in bfloat16."""
    param = param.astype(jnp.float32)
    return stochastic_round(param + step, key) - param


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> float32 that bfloat16 holds exactly: x in the mean; NaN and infinity as they are.

    Noise below the last bit that is kept, then the bits below it cut off.
    """
    noise = _noise(x.shape, key) >> 16
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)


def _noise(shape, key) -> jax.Array:
    """uint32 from a number per entry, mixed; jax's own would take longer than the update itself.

    The finaliser of Appleby, MurmurHash3, 2011.
    """
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    x = number ^ jax.random.bits(key, (), jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
