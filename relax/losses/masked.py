"""Sums, means and whitening over the entries where a mask is true.

Other entries, even NaN, affect neither value nor gradient.

Axes: B rows, T tokens, or any others.
"""

import jax
import jax.numpy as jnp

from relax.losses.shapes import require_same_shape


def masked_sum(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum over the entries where `mask` is true: Σ m x.

    Args:
      values: any shape.
      mask: the same shape, bool.
      axis: the axis to sum over; None sums over all.

    Returns:
      A scalar, or `values` without `axis`; 0 if nothing is true.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])).item()
      4.0
    """
    require_same_shape(values=values, mask=mask)
    # `where`, not a product: 0 · NaN would be NaN, in the value and in the gradient.
    return jnp.where(mask, values, 0.0).sum(axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean over the entries where `mask` is true: Σ m x / max(1, Σ m).

    Args:
      values: any shape.
      mask: the same shape, bool.
      axis: the axis to average over; None averages over all.

    Returns:
      A scalar, or `values` without `axis`; 0 if nothing is true.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> masked_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])).item()
      2.0
    """
    return masked_sum(values, mask, axis) / jnp.maximum(mask.sum(axis=axis), 1)


def masked_whiten(values: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """Mean 0 and variance 1 over the entries where `mask` is true; 0 elsewhere.

        (x - μ) / sqrt(σ² + 1e-8),   σ² unbiased

    Args:
      values: any shape.
      mask: the same shape, bool.
      shift_mean: False keeps the mean, by adding μ again.

    Returns:
      The same shape.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> masked_whiten(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0, 1, 1, 0]) > 0).round(4)
      Array([ 0.    , -0.7071,  0.7071,  0.    ], dtype=float32)
    """
    require_same_shape(values=values, mask=mask)
    # The largest is subtracted first, so equal values give exactly 0; a difference of 1e-5 from
    # the rounded mean would be scaled up to 0.1.
    largest = jnp.where(mask.any(), jnp.where(mask, values, -jnp.inf).max(), 0.0)
    shifted = jnp.where(mask, values - largest, 0.0)
    mean = masked_mean(shifted, mask)
    centred = shifted - mean
    variance = masked_sum(jnp.square(centred), mask) / jnp.maximum(mask.sum() - 1, 1)
    white = centred * jax.lax.rsqrt(variance + 1e-8)
    white = white if shift_mean else white + (mean + largest)
    return jnp.where(mask, white, 0.0)
