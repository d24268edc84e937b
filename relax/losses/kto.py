"""KTO's loss, of completions that are individually desirable or undesirable.

Axes: N completions.
"""

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean
from relax.losses.shapes import require_same_shape


def kto_loss(
    scores: jax.Array,
    kl: jax.Array,
    is_desirable: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """KTO's loss for completions that are individually desirable or undesirable.

        λ_D (1 - σ(β (s - z))) if desirable,   λ_U (1 - σ(β (z - s))) if not

    Args:
      scores: `[N]` s, log π_θ(y) - log π_ref(y), nats.
      kl: scalar z, from `kto_reference_point`; has no gradient.
      is_desirable: `[N]` bool.
      beta: above 0.
      desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
      `[N]`, in (0, λ).

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> kto_loss(jnp.array([0.0, 0.0]), jnp.array(0.0), jnp.array([True, False])).tolist()
      [0.5, 0.5]

    References:
      Ethayarajh et al., KTO, 2024, https://arxiv.org/abs/2402.01306, eq. 8
    """
    require_same_shape(1, scores=scores, is_desirable=is_desirable)
    z = jax.lax.stop_gradient(kl)
    good = desirable_weight * jax.nn.sigmoid(-beta * (scores - z))
    return jnp.where(is_desirable, good, undesirable_weight * jax.nn.sigmoid(beta * (scores - z)))


def kto_reference_point(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KTO's z = max(0, mean s'), an estimate of KL(π_θ ‖ π_ref).

    Args:
      scores: `[N]` s' of prompts paired with another row's completion, nats.
      mask: `[N]` bool, true on rows that count; other entries are ignored.

    Returns:
      A scalar (>= 0), nats.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> kto_reference_point(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0]) > 0).item()
      1.5

    References:
      As `kto_loss`, section 4.2
    """
    require_same_shape(1, scores=scores, mask=mask)
    return jnp.maximum(masked_mean(scores, mask), 0.0)
