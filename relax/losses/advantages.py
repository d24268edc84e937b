"""Advantages: how much better a completion or a token is than expected.

An advantage is a function of rewards `[P, G]` to advantages `[P, G]`, registered by name. A reward
is NaN if no reward function applied: its advantage is 0, and its group's statistics exclude it.
To add your own:

    @register_advantage("mine")
    def mine(rewards):
        return rewards - np.nanmedian(rewards, axis=1, keepdims=True)

The trainer computes advantages on the host, in float64: rewards of 10,000,000.25 and 10,000,000.5
are the same number in float32. Numpy arrays give numpy arrays; JAX arrays, traced ones included,
give JAX arrays.

Axes: P prompts, G completions of a group, B rows, T tokens.
"""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses.registry import Registry
from relax.losses.shapes import require_same_shape

EPSILON = 1e-4  # TRL's, in the denominators of scaled advantages

ADVANTAGES: Registry[Callable] = Registry("scale_rewards")
register_advantage = ADVANTAGES.register


@register_advantage("group")
def group_advantages(rewards):
    """GRPO's advantages: rewards minus their group's mean, divided by its standard deviation.

        Â = (r - μ_group) / (σ_group + 1e-4),   σ unbiased

    Args:
      rewards: `[P, G]`, finite, or NaN if there is none.

    Returns:
      `[P, G]`; 0 where a reward is NaN, and exactly 0 in a group of equal rewards.

    Raises:
      ValueError: `rewards` does not have two axes.

    Example:
      >>> group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]])).round(4).tolist()
      [[0.8659, -0.8659, -0.8659, 0.8659]]

    References:
      Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300, section 4.1.2
    """
    return _or_zero(rewards, _centred(rewards) / (nan_std(rewards, 1, keepdims=True) + EPSILON))


@register_advantage("batch")
def batch_advantages(rewards):
    """Rewards minus their group's mean, divided by the standard deviation of the batch.

        Â = (r - μ_group) / (σ_batch + 1e-4)

    Arguments and result as for `group_advantages`.

    Example:
      >>> batch_advantages(np.array([[1.0, 0.0], [0.0, 0.0]])).round(4).tolist()
      [[0.9998, -0.9998], [0.0, 0.0]]

    References:
      Liu et al., Part I: Tricks or Traps?, 2025, https://arxiv.org/abs/2508.08221, section 4.1
    """
    return _or_zero(rewards, _centred(rewards) / (nan_std(rewards) + EPSILON))


@register_advantage("none")
def centred_advantages(rewards):
    """Dr. GRPO's advantages: rewards minus their group's mean, Â = r - μ_group.

    Arguments and result as for `group_advantages`.

    Example:
      >>> centred_advantages(np.array([[1.0, 0.0, np.nan]])).tolist()
      [[0.5, -0.5, 0.0]]

    References:
      Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), 2025,
      https://arxiv.org/abs/2503.20783, eq. 2
    """
    return _or_zero(rewards, _centred(rewards))


@register_advantage("rloo")
def rloo_advantages(rewards):
    """RLOO's advantages: each reward minus the mean of the others of its group.

        Â_i = r_i - Σ_{j≠i} r_j / (G - 1) = (r_i - μ) G / (G - 1)

    Arguments and result as for `group_advantages`; 0 for the only reward of a group.

    Example:
      >>> rloo_advantages(np.array([[1.0, 0.0, 0.0, 1.0]])).round(4).tolist()
      [[0.6667, -0.6667, -0.6667, 0.6667]]

    References:
      Ahmadian et al., Back to Basics, 2024, https://arxiv.org/abs/2402.14740, eq. 8
    """
    xp = _numpy_of(rewards)
    counts = (~xp.isnan(rewards)).sum(axis=1, keepdims=True)
    return _or_zero(rewards, _centred(rewards) * (counts / xp.maximum(counts - 1, 1)))


def nan_std(values, axis: int | None = None, keepdims: bool = False):
    """Unbiased standard deviation of the entries that are not NaN.

    Args:
      values: any shape.
      axis: the axis to reduce; None reduces all.
      keepdims: keep reduced axes, with size 1.

    Returns:
      NaN if all entries are NaN, 0 if exactly one is not.

    Example:
      >>> nan_std(np.array([1.0, 2.0, 3.0, np.nan])).item()
      1.0
    """
    xp = _numpy_of(values)
    counts = (~xp.isnan(values)).sum(axis=axis, keepdims=keepdims)
    shifted = values - _nan(xp.nanmax, values, axis)  # see `_centred`
    squares = xp.nansum(xp.square(shifted - _nan(xp.nanmean, shifted, axis)), axis=axis)
    squares = squares.reshape(counts.shape)
    return xp.where(counts > 0, xp.sqrt(squares / xp.maximum(counts - 1, 1)), xp.nan)


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


def _numpy_of(values):
    return jnp if isinstance(values, jax.Array) else np


def _nan(reduce: Callable, values, axis: int | None):
    """A reduction that skips NaN and keeps its axes; it is NaN for a slice of NaN only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's for a slice of NaN
        return reduce(values, axis=axis, keepdims=True)


def _centred(rewards):
    """r - μ in each group.

    The largest reward is subtracted first, which is exact for close rewards, so equal rewards give
    exactly 0. With the rounded mean of 99.9s they would give 1e-14 or, in float32, 1e-5, which an
    equally small standard deviation would scale up to an advantage.
    """
    require_same_shape(2, rewards=rewards)
    xp = _numpy_of(rewards)
    shifted = rewards - _nan(xp.nanmax, rewards, 1)
    return shifted - _nan(xp.nanmean, shifted, 1)


def _or_zero(rewards, advantages):
    """0 only where there is no reward: an overflow stays NaN and stops the run."""
    xp = _numpy_of(rewards)
    return xp.where(xp.isnan(rewards), 0.0, advantages)
