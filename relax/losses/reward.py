"""The loss of reward models: pure functions of the scores of two answers to one prompt.

Axes: N pairs.
"""

import jax
import jax.numpy as jnp


def bradley_terry_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """How unlikely the preference is where scores are log-odds.

        L = -log σ(r_c - r_r - margin)

    Args:
      chosen, rejected: `[N]` scores.
      margin: `[N]`, by how much the first should exceed the second.

    Returns:
      `[N]`, in nats.

    Bradley and Terry, Rank analysis of incomplete block designs, 1952; the margin is of Touvron et
    al., Llama 2, 2023, eq. 2.

    >>> bradley_terry_loss(jnp.array([1.0, 0.2]), jnp.array([0.5, 0.6])).mean().round(6)
    Array(0.693546, dtype=float32)
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centering_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """How far scores lie from 0 on the whole, which Bradley-Terry leaves open.

        L = (r_c + r_r)²

    Eisenstein et al., Helping or herding?, 2023, eq. 2.

    >>> centering_loss(jnp.array([1.0, 0.2]), jnp.array([0.5, -0.2])).tolist()
    [2.25, 0.0]
    """
    return jnp.square(chosen + rejected)
