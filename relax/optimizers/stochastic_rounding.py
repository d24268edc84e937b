"""Stochastic rounding of bfloat16 parameters, so that small updates are not lost."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      inner: the wrapped optimizer's state.
      count: int32 scalar, updates made.
    """

    inner: Any
    count: jax.Array  # type: ignore[assignment]  # tuple.count; checkpoints hold the name


def stochastic_rounding(
    optimizer: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformation:
    """Rounds updated bfloat16 parameters up or down at random, so that the mean is exact.

    A bfloat16 number has 8 significant bits. Rounding to nearest loses an update of less than half
    of the last bit: for a weight of 0.02 those below 3e-5, as most updates of fine-tuning are. Here
    the weight changes by the whole last bit, with probability update / last bit. Parameters of
    other dtypes are updated as usual.

    Args:
      optimizer: an optimizer with float32 updates, such as those of `relax.optimizers`.
      seed: seed of the rounding.

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, 2015,
      https://arxiv.org/abs/1502.02551, section 3
    """

    def init(params):
        return RoundingState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        updates, inner = optimizer.update(updates, state.inner, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, tree = jax.tree.flatten(params)
        numbers = jax.tree.unflatten(tree, range(len(leaves)))

        def step(param, update, number):
            if param.dtype != jnp.bfloat16:
                return update
            return _rounded_step(param, update, jax.random.fold_in(key, number))

        steps = jax.tree.map(step, params, updates, numbers)
        return steps, RoundingState(inner, state.count + 1)

    return optax.GradientTransformation(init, update)


def _rounded_step(param, step, key):
    """The float32 step to a neighbour of param + step in bfloat16."""
    param = param.astype(jnp.float32)
    return stochastic_round(param + step, key) - param


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to a neighbour that bfloat16 holds exactly; its mean is x.

    Adds noise below the last bit of bfloat16, then clears those bits. NaN and infinity are kept.

    Args:
      x: float32, any shape.
      key: key of the noise.

    Returns:
      float32, the same shape.
    """
    below = noise(x.shape, key) >> 16
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + below) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)


def noise(shape, key) -> jax.Array:
    """A uint32 per entry: its index, hashed.

    `jax.random.bits` would take longer than the update itself on CPUs. The hash is the finaliser of
    Appleby, MurmurHash3, 2011.
    """
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    x = number ^ jax.random.bits(key, (), jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
