"""Losses of reward models: functions of the scores of two completions of one prompt.

Axes: N pairs.
"""

import jax
import jax.numpy as jnp

from relax.losses.shapes import require_same_shape


def bradley_terry_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | None = None
) -> jax.Array:
    """Negative log-likelihood of preferences whose log-odds are differences of scores.

        L = -log σ(r_c - r_r - margin)

    Args:
      chosen: `[N]` scores of the chosen completions.
      rejected: `[N]` scores of the rejected ones.
      margin: `[N]`, by how much the first should exceed the second; None: 0.

    Returns:
      `[N]`, nats; log 2 where the scores are equal.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> bradley_terry_loss(jnp.array([1.0, 0.2]), jnp.array([0.5, 0.6])).mean().round(6)
      Array(0.693546, dtype=float32)

    References:
      Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952,
      https://doi.org/10.2307/2334029
      Touvron et al., Llama 2, 2023, https://arxiv.org/abs/2307.09288, eq. 2 (the margin)
    """
    require_same_shape(1, chosen=chosen, rejected=rejected, margin=margin)
    difference = chosen - rejected
    return -jax.nn.log_sigmoid(difference if margin is None else difference - margin)


def centering_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Penalty on scores far from 0; Bradley-Terry fixes their difference only.

        L = (r_c + r_r)²

    Args:
      chosen: `[N]` scores of the chosen completions.
      rejected: `[N]` scores of the rejected ones.

    Returns:
      `[N]`.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> centering_loss(jnp.array([1.0, 0.2]), jnp.array([0.5, -0.2])).tolist()
      [2.25, 0.0]

    References:
      Eisenstein et al., Helping or Herding?, 2023, https://arxiv.org/abs/2312.09244, eq. 2
    """
    require_same_shape(1, chosen=chosen, rejected=rejected)
    return jnp.square(chosen + rejected)
