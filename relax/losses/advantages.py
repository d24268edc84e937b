"""Advantages: how much better a completion, or a token, was than expected.

A group's advantage is a function `f(rewards [P, G]) -> advantages [P, G]`, registered by name in
`ADVANTAGES`; a reward that is NaN (no reward function applied) gets advantage 0 and has no part in
the group's statistics. To add one:

    @register_advantage("mine")
    def mine(rewards):
        return rewards - jnp.nanmedian(rewards, axis=1, keepdims=True)

Axes: P prompts, G completions of a group, B rows, T tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # TRL's, in the denominators of scaled advantages

ADVANTAGES: dict[str, Callable] = {}


def register_advantage(name: str):
    """Makes a function of rewards `[P, G]` known by a name."""

    def register(function):
        ADVANTAGES[name] = function
        return function

    return register


@register_advantage("group")
def group_advantages(rewards: jax.Array) -> jax.Array:
    """(r - μ_group) / (σ_group + 1e-4), σ unbiased. Shao et al., DeepSeekMath, 2024, section 4.1.

    >>> group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]])).round(4)
    Array([[ 0.8659, -0.8659, -0.8659,  0.8659]], dtype=float32)
    """
    return _or_zero(_centred(rewards) / (nan_std(rewards, axis=1, keepdims=True) + EPSILON))


@register_advantage("batch")
def batch_advantages(rewards: jax.Array) -> jax.Array:
    """(r - μ_group) / (σ_batch + 1e-4). Liu et al., Part I: Tricks or Traps?, 2025, section 4.1."""
    return _or_zero(_centred(rewards) / (nan_std(rewards) + EPSILON))


@register_advantage("none")
def centred_advantages(rewards: jax.Array) -> jax.Array:
    """r - μ_group. Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), 2025, eq. 2."""
    return _or_zero(_centred(rewards))


@register_advantage("rloo")
def rloo_advantages(rewards: jax.Array) -> jax.Array:
    """r minus the mean of the others of its group. Ahmadian et al., Back to Basics, 2024, eq. 8.

    >>> rloo_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]])).round(4)
    Array([[ 0.6667, -0.6667, -0.6667,  0.6667]], dtype=float32)
    """
    counts = (~jnp.isnan(rewards)).sum(axis=1, keepdims=True)
    others = jnp.nansum(rewards, axis=1, keepdims=True) - rewards
    advantages = rewards - others / jnp.maximum(counts - 1, 1)
    return _or_zero(jnp.where(counts > 1, advantages, 0.0))


def nan_std(values: jax.Array, axis=None, keepdims: bool = False) -> jax.Array:
    """The unbiased standard deviation of what is not NaN; NaN where nothing is, 0 for a single one.

    >>> nan_std(jnp.array([1.0, 2.0, 3.0, jnp.nan])).item()
    1.0
    """
    counts = (~jnp.isnan(values)).sum(axis=axis, keepdims=keepdims)
    mean = jnp.nanmean(values, axis=axis, keepdims=True)
    squares = jnp.nansum(jnp.square(values - mean), axis=axis, keepdims=keepdims)
    return jnp.where(counts > 0, jnp.sqrt(squares / jnp.maximum(counts - 1, 1)), jnp.nan)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the real tokens, from the last to the first.

        δ_t = r_t + γ V_{t+1} - V_t,   Â_t = δ_t + γ λ Â_{t+1},   R_t = Â_t + V_t

    A masked token (padding, an observation) is passed over: the token before it sees the value and
    the advantage of the next real one. Schulman et al., High-Dimensional Continuous Control Using
    Generalized Advantage Estimation, 2016, eq. 16.

    Args:
      rewards, values: `[B, T]`; what stands in masked places is not read.
      mask: `[B, T]` bool.
      gamma, lam: in [0, 1].

    Returns:
      Advantages and returns `[B, T]`, 0 where masked.
    """
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def step(carry, token):
        next_value, next_advantage = carry
        reward, value, real = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage))
        return carry, jnp.where(real, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0])
    tokens = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0.0)


def _centred(rewards):
    return rewards - jnp.nanmean(rewards, axis=1, keepdims=True)


def _or_zero(advantages):
    return jnp.nan_to_num(advantages, nan=0.0)
