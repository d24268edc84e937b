"""Estimates of KL(π ‖ π_ref) from the log-probabilities of tokens drawn from π.

With Δ = log π - log π_ref per token (Schulman, Approximating KL Divergence, 2020):

    k1 = Δ          unbiased, of either sign
    k2 = Δ² / 2     biased, low variance; its gradient is that of the KL
    k3 = e^-Δ + Δ - 1   unbiased, never negative; its gradient is not that of the KL

Axes: B rows, T tokens.
"""

import jax
import jax.numpy as jnp

KL_ESTIMATORS = {
    "k1": lambda delta: delta,
    "k2": lambda delta: jnp.square(delta) / 2,
    "k3": lambda delta: jnp.expm1(-delta) + delta,
}


def kl_estimate(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, estimator: str = "k3"
) -> jax.Array:
    """The estimate per token, 0 where masked.

    Args:
      logprobs, ref_logprobs: `[B, T]`, nats.
      mask: `[B, T]` bool.
      estimator: `k1`, `k2` or `k3`.

    Raises:
      ValueError: another estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"unknown KL estimator {estimator!r}. Known: {', '.join(sorted(KL_ESTIMATORS))}."
        )
    # Masked before the exponential: 0 · inf in the gradient would be NaN.
    delta = jnp.where(mask, logprobs, 0.0) - jnp.where(mask, ref_logprobs, 0.0)
    return KL_ESTIMATORS[estimator](delta)
