"""Estimates of KL(π ‖ π_ref) from the log-probabilities of tokens drawn from π.

With Δ = log π - log π_ref per token:

    k1 = Δ              unbiased, may be negative
    k2 = Δ² / 2         biased, low variance; its gradient is that of the KL
    k3 = e^-Δ + Δ - 1   unbiased, never negative; its gradient is not that of the KL

Axes: B completions, T tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from relax.losses.registry import Registry
from relax.losses.shapes import Array, require_same_shape

KL_ESTIMATORS: Registry[Callable[[jax.Array], jax.Array]] = Registry("kl_estimator")
register_kl_estimator = KL_ESTIMATORS.register


@register_kl_estimator("k1")
def k1(delta: jax.Array) -> jax.Array:
    """Δ."""
    return delta


@register_kl_estimator("k2")
def k2(delta: jax.Array) -> jax.Array:
    """Δ² / 2."""
    return jnp.square(delta) / 2


@register_kl_estimator("k3")
def k3(delta: jax.Array) -> jax.Array:
    """e^-Δ + Δ - 1, exact near 0 too.

    Below Δ = -88 it is infinite in float32, and so is the loss: the step is skipped and counted.
    With a clamped exponent the term Δ alone would set the gradient, which points away from the
    reference.
    """
    return jnp.expm1(-delta) + delta


def kl_estimate(
    logprobs: Array, ref_logprobs: Array, mask: Array, estimator: str = "k3"
) -> jax.Array:
    """Estimate of KL(π ‖ π_ref) per token; its mean over tokens drawn from π is the estimate.

    Args:
      logprobs: `[B, T]` of the tokens under π, nats.
      ref_logprobs: `[B, T]` of the same tokens under π_ref, nats.
      mask: `[B, T]` bool, true on tokens that count; other entries are ignored. Any shape
        common to the three works.
      estimator: a name in `KL_ESTIMATORS`: `k1`, `k2`, `k3`, or one of your own
        (`register_kl_estimator`).

    Returns:
      `[B, T]` nats, 0 where masked.

    Raises:
      ValueError: the estimator is unknown, or the shapes differ.

    Example:
      >>> arrays = jnp.array([[-1.0, -0.5]]), jnp.array([[-1.5, -0.5]]), jnp.array([[True, True]])
      >>> kl_estimate(*arrays, "k1")
      Array([[0.5, 0. ]], dtype=float32)
      >>> kl_estimate(*arrays).round(4)  # e^-0.5 - 0.5
      Array([[0.1065, 0.    ]], dtype=float32)

    References:
      Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    # Masked before the exponential: 0 · inf in the gradient would be NaN.
    delta = jnp.where(mask, logprobs, 0.0) - jnp.where(mask, ref_logprobs, 0.0)
    return KL_ESTIMATORS[estimator](delta)
