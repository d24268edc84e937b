"""Reductions over real entries. What stands in a masked place, NaN included, changes nothing.

Axes: B rows, T tokens.
"""

import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Σ m x."""
    return jnp.where(mask, values, 0.0).sum(axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Σ m x / max(1, Σ m)."""
    return masked_sum(values, mask, axis) / jnp.maximum(mask.sum(axis=axis), 1)


def masked_whiten(values: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """(x - μ) / sqrt(σ² + 1e-8) over the real entries, σ² unbiased; 0 where masked.

    Args:
      values: any shape.
      mask: the same shape, bool.
      shift_mean: False adds μ again.

    >>> masked_whiten(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0, 1, 1, 0]) > 0).round(4)
    Array([ 0.    , -0.7071,  0.7071,  0.    ], dtype=float32)
    """
    count = mask.sum()
    mean = masked_mean(values, mask)
    variance = masked_sum(jnp.square(jnp.where(mask, values, mean) - mean), mask)
    variance = variance / jnp.maximum(count - 1, 1)
    white = (jnp.where(mask, values, mean) - mean) * jax.lax.rsqrt(variance + 1e-8)
    white = white if shift_mean else white + mean
    return jnp.where(mask, white, 0.0)
