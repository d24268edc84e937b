"""Advantages of tokens from a critic's values.

Axes: B completions, T tokens of a completion.
"""

import jax
import jax.numpy as jnp

from relax.losses.shapes import require_same_shape


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation, from the last token to the first.

        δ_t = r_t + γ V_{t+1} - V_t,   Â_t = δ_t + γ λ Â_{t+1},   R_t = Â_t + V_t

    A masked token (padding, an environment's text) is skipped: the token before it uses the value
    and the advantage of the next unmasked one. After the last one both are 0.

    Args:
      rewards: `[B, T]`.
      values: `[B, T]`, value of the state in which token t was drawn.
      mask: `[B, T]` bool, true on the policy's tokens; other entries are ignored.
      gamma: discount γ, in [0, 1].
      lam: λ in [0, 1]; 1 gives Monte Carlo returns, 0 one-step errors.

    Returns:
      Advantages and returns, `[B, T]` each, 0 where masked.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.75]])
      >>> advantages, returns = gae(rewards, values, jnp.array([[True, True]]), lam=1.0)
      >>> advantages.tolist(), returns.tolist()
      ([[0.5, 0.25]], [[1.0, 1.0]])

    References:
      Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation,
      2016, https://arxiv.org/abs/1506.02438, eq. 16
    """
    require_same_shape(2, rewards=rewards, values=values, mask=mask)
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def step(carry, token):
        next_value, next_advantage = carry
        reward, value, counts = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage))
        return carry, jnp.where(counts, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], rewards.dtype)
    tokens = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0.0)
