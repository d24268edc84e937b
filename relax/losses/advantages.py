"""Advantages of completions: how much better each is than the others of its group or batch.

An advantage is a function of rewards `[P, G]` to advantages `[P, G]`, registered by name. A reward
is NaN if no reward function applied: its advantage is 0, and its group's statistics exclude it.
To add your own:

    @register_advantage("mine")
    def mine(rewards):
        return rewards - np.nanmedian(rewards, axis=1, keepdims=True)

The trainer computes advantages on the host, in float64: rewards of 10,000,000.25 and 10,000,000.5
are the same number in float32. Numpy arrays give numpy arrays; JAX arrays, traced ones included,
give JAX arrays.

Axes: P prompts, G completions of a group, F reward functions.
"""

import functools
import math
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


@register_advantage("reinforce_plus_plus")
def reinforce_plus_plus_advantages(rewards):
    """REINFORCE++'s advantages: rewards normalised over the whole batch, without groups.

        Â = (r - μ_batch) / (σ_batch + 1e-4)

    Arguments and result as for `group_advantages`. Every completion counts once; verl and OpenRLHF
    weight it by its tokens.

    Example:
      >>> reinforce_plus_plus_advantages(np.array([[1.0, 0.0], [0.0, 0.0]])).round(4).tolist()
      [[1.4997, -0.4999], [-0.4999, -0.4999]]

    References:
      Hu, REINFORCE++, 2025, https://arxiv.org/abs/2501.03262
    """
    return _or_zero(rewards, _normalised(rewards))


@register_advantage("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline_advantages(rewards):
    """Rewards minus their group's mean, then normalised over the whole batch.

        Â = (c - μ_batch(c)) / (σ_batch(c) + 1e-4),   c = r - μ_group

    `batch_advantages` divides by the standard deviation of r, this by that of c. Arguments and
    result as for `group_advantages`.

    Example:
      >>> found = reinforce_plus_plus_baseline_advantages(np.array([[1.0, 0.0], [0.0, 0.0]]))
      >>> found.round(4).tolist()
      [[1.2244, -1.2244], [0.0, 0.0]]

    References:
      As `reinforce_plus_plus_advantages`
    """
    return _or_zero(rewards, _normalised(_centred(rewards)))


@register_advantage("maxrl")
def maxrl_advantages(rewards):
    """MaxRL's advantages: rewards minus their group's mean, divided by that mean.

        Â = (r - μ_group) / μ_group,   0 where μ_group <= 0

    For rewards of 0 and 1 it weights a prompt by one over its success rate, as maximum likelihood
    does: hard prompts count more. Arguments and result as for `group_advantages`.

    Example:
      >>> maxrl_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
      [[3.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]

    References:
      Tajwar et al., Maximum Likelihood Reinforcement Learning, 2026,
      https://arxiv.org/abs/2602.02710
    """
    xp, mean = _numpy_of(rewards), _mean_reward(rewards)
    scaled = _centred(rewards) / xp.where(mean > 0, mean, 1.0)
    return _or_zero(rewards, xp.where(mean > 0, scaled, 0.0))


@register_advantage("gpg")
def gpg_advantages(rewards):
    """GPG's advantages: α (r - μ_group), with α = groups / groups of unequal rewards.

    Groups of equal rewards add nothing to the gradient; α makes up for them in its mean. Arguments
    and result as for `group_advantages`.

    Example:
      >>> gpg_advantages(np.array([[1.0, 0.0], [0.0, 0.0]])).tolist()
      [[1.0, -1.0], [0.0, 0.0]]

    References:
      Chu et al., GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning,
      2025, https://arxiv.org/abs/2504.02546. verl's α is completions / completions of a reward
      other than 0.
    """
    xp, centred = _numpy_of(rewards), _or_zero(rewards, _centred(rewards))
    unequal = (centred != 0).any(axis=1).sum()
    return centred * (rewards.shape[0] / xp.maximum(unequal, 1))


def pass_at_k_advantages(rewards, k: int = 4):
    """Advantages for the best of k completions, averaged over all groups of k that one is in.

        Â_i = mean_{S ∋ i} (max_S r - μ) / (σ + 1e-4),   |S| = k

    with the mean μ and the standard deviation σ of max_S r over all subsets S of a group. Rewards
    of 0 and 1 give the paper's (1 - μ) / σ to right completions, with μ the group's pass@k, and a
    wrong one gets less the fewer of its subsets are right.

    Args:
      rewards: as for `group_advantages`, a numpy array.
      k: size of the subsets (>= 1); a group of fewer rewards has advantages of 0.

    Returns:
      `[P, G]`; 0 where a reward is NaN, and exactly 0 in a group of equal rewards.

    Raises:
      ValueError: `rewards` does not have two axes.

    Example:
      >>> pass_at_k_advantages(np.array([[1.0, 0.0, 0.0, 0.0]]), k=2).round(4).tolist()
      [[0.9998, -0.3333, -0.3333, -0.3333]]

    References:
      Chen et al., Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large
      Reasoning Models, 2025, https://arxiv.org/abs/2508.10751, eq. 14 and 15
    """
    require_same_shape(2, rewards=rewards)
    out = np.zeros(np.shape(rewards))
    for group, found in zip(np.asarray(rewards, np.float64), out, strict=True):
        there = np.flatnonzero(~np.isnan(group))
        n = len(there)
        if n < k or np.ptp(group[there]) == 0:
            continue
        order = there[np.argsort(group[there], kind="stable")]
        ranked = group[order] - group[order].max()  # see `_centred`
        # Subsets whose best is the one of rank j, among all, and among those with a lower one i.
        best = np.array([math.comb(j, k - 1) for j in range(n)]) / math.comb(n, k)
        with_lower = np.array([math.comb(j - 1, k - 2) if j and k > 1 else 0 for j in range(n)])
        own = np.array([math.comb(j, k - 1) for j in range(n)])
        mean = best @ ranked
        std = math.sqrt(max(best @ np.square(ranked - mean), 0.0))
        above = np.append(np.cumsum((with_lower * ranked)[::-1])[::-1][1:], 0.0)
        means = (own * ranked + above) / math.comb(n - 1, k - 1)
        found[order] = (means - mean) / (std + EPSILON)
    return out


for _k in (2, 4, 8, 16):
    register_advantage(f"pass@{_k}")(functools.partial(pass_at_k_advantages, k=_k))


def gdpo_advantages(by_function, weights):
    """GDPO's advantages: each reward function's rewards are normalised before they are summed.

        z_f = (r_f - μ_group(r_f)) / (σ_group(r_f) + 1e-4),   s = Σ_f w_f z_f
        Â = (s - μ_batch(s)) / (σ_batch(s) + 1e-4)

    The sum of rewards is dominated by the function of the largest spread; here each counts by its
    weight.

    Args:
      by_function: `[P, G, F]`, the rewards of F functions; NaN if one does not apply.
      weights: `[F]`.

    Returns:
      `[P, G]`; 0 for a completion without any reward.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> rewards = np.array([[[1.0, 100.0], [0.0, 100.0]]])
      >>> gdpo_advantages(rewards, np.ones(2)).round(4).tolist()
      [[0.707, -0.707]]

    References:
      GDPO: Group reward-Decoupled Normalization Policy Optimization, 2026,
      https://arxiv.org/abs/2601.05242; as TRL's `normalize_then_sum`
    """
    xp = _numpy_of(by_function)
    require_same_shape(1, functions=by_function[0, 0], weights=weights)
    parts = [group_advantages(by_function[..., f]) * w for f, w in enumerate(weights)]
    total, none = sum(parts), xp.isnan(by_function).all(axis=2)
    total = xp.where(none, xp.nan, total)
    return _or_zero(total, _normalised(total))


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


def _mean_reward(rewards):
    """μ_group, `[P, 1]`; NaN for a group without rewards."""
    return _nan(_numpy_of(rewards).nanmean, rewards, 1)


def _normalised(values):
    """Minus the mean over the batch, divided by its standard deviation; equal values give 0."""
    require_same_shape(2, rewards=values)
    xp = _numpy_of(values)
    shifted = values - _nan(xp.nanmax, values, None)  # see `_centred`
    return (shifted - _nan(xp.nanmean, shifted, None)) / (nan_std(values) + EPSILON)


def _or_zero(rewards, advantages):
    """0 only where there is no reward: an overflow stays NaN and stops the run."""
    xp = _numpy_of(rewards)
    return xp.where(xp.isnan(rewards), 0.0, advantages)
