"""The critic's loss.

Axes: B completions, T tokens of a completion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from relax.losses.shapes import require_same_shape


class ValueLosses(NamedTuple):
    """Losses per state, and where the clipped error counts.

    Attributes:
      losses: `[B, T]`, 0 where masked.
      clipped: `[B, T]` bool, true where the clipped value's error is the larger one; the value has
        no gradient there.
    """

    losses: jax.Array
    clipped: jax.Array


def value_losses(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None = 0.2,
) -> ValueLosses:
    """Squared error of each value, whose gradient stops once it has moved by ε.

        l = ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)

    Args:
      values: `[B, T]` of the critic that is trained.
      old_values: `[B, T]` of the critic before the first update on this rollout.
      returns: `[B, T]` targets R.
      mask: `[B, T]` bool, the states that count; elsewhere anything may stand.
      clip: ε (>= 0); None: the plain squared error.

    Returns:
      A `ValueLosses`; the mean of `losses` over the mask is the critic's loss.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> losses, clipped = value_losses(*(jnp.array([[x]]) for x in (1.0, 0.5, 1.0, True)))
      >>> round(losses.item(), 3), clipped.item()
      (0.045, True)

    References:
      Schulman et al., Proximal Policy Optimization Algorithms, 2017,
      https://arxiv.org/abs/1707.06347, eq. 9; the clipping is in its authors' code: Huang et al.,
      The 37 Implementation Details of PPO, 2022, detail 9,
      https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details
    """
    require_same_shape(2, values=values, old_values=old_values, returns=returns, mask=mask)
    # Masked before the difference: 0 · NaN in the gradient would be NaN.
    values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    errors = jnp.square(values - returns)
    if clip is None:
        return ValueLosses(errors / 2, jnp.zeros_like(mask))
    near = jnp.clip(values, old_values - clip, old_values + clip)
    clipped_errors = jnp.square(near - returns)
    return ValueLosses(jnp.maximum(errors, clipped_errors) / 2, clipped_errors > errors)
