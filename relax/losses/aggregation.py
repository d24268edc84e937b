"""Aggregations: from losses per token to the loss of a batch of completions.

Each returns the loss and its weight, the number of tokens or completions that it is the mean of.

Axes: B completions, T tokens of a completion.
"""

from collections.abc import Callable

import jax

from relax.losses.masked import masked_mean, masked_sum
from relax.losses.registry import Registry

Aggregation = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array | int]]

AGGREGATIONS: Registry[Aggregation] = Registry("aggregation")


@AGGREGATIONS.register("token_mean")
def token_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """Mean over tokens, Σ m l / Σ m: every token has the same weight.

    Args:
      losses, mask: `[B, T]`.
      max_length: maximum tokens of a completion.

    Returns:
      The loss, and its weight: the number of tokens.

    References:
      Yu et al., DAPO, 2025, https://arxiv.org/abs/2503.14476, eq. 8
    """
    del max_length
    return masked_mean(losses, mask), mask.sum()


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """Mean over completions of their means over tokens: every completion has the same weight.

    Args as for `token_mean`; the weight is B, completions without a token included (as in TRL).

    References:
      Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300, eq. 3
    """
    del max_length
    return masked_mean(losses, mask, axis=1).mean(), mask.shape[0]


@AGGREGATIONS.register("constant_mean")
def constant_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """Σ m l / (B · max_length): the length of a completion does not scale its tokens.

    Args as for `token_mean`; the weight is B.

    References:
      Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), 2025,
      https://arxiv.org/abs/2503.20783, eq. 2
    """
    return masked_sum(losses, mask) / (mask.shape[0] * max_length), mask.shape[0]


@AGGREGATIONS.register("sequence_sum")
def sequence_sum(losses: jax.Array, mask: jax.Array, max_length: int):
    """Σ m l / B: the sum over a completion's tokens, averaged over completions.

    Args as for `token_mean`; the weight is B.

    References:
      Liu et al., Length-Unbiased Sequence Policy Optimization (LUSPO), 2026,
      https://arxiv.org/abs/2602.05261; as TRL's `luspo`
    """
    del max_length
    return masked_sum(losses, mask) / mask.shape[0], mask.shape[0]
