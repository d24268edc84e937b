"""Tokens that a policy loss is computed on, for `policy_loss(keep=...)`.

Axes: B completions, T tokens of a completion.
"""

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean
from relax.losses.shapes import require_same_shape


def near_policy(
    logprobs: jax.Array,
    sampling_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    threshold: float,
) -> jax.Array:
    """Completions of advantage 0 or more, and those whose policy is near the one that drew them.

        Â >= 0   or   mean_t (log π_sampler - log π_θ) <= δ

    Lowering a completion that the policy hardly writes any more destabilises training.

    Args:
      logprobs: `[B, T]` under the policy that is trained, nats; the result has no gradient.
      sampling_logprobs: `[B, T]` under the sampler's policy, nats.
      advantages: `[B]`.
      mask: `[B, T]` bool, true on the policy's tokens; other entries are ignored.
      threshold: δ, nats per token, above 0.

    Returns:
      `[B, 1]` bool, true on completions to train on.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> logs = jnp.array([[-3.0], [-3.0]]), jnp.array([[-1.0], [-1.0]]), jnp.array([1.0, -1.0])
      >>> near_policy(*logs, jnp.ones((2, 1), bool), threshold=0.5).tolist()
      [[True], [False]]

    References:
      DeepSeek-AI, DeepSeek-V3.2, 2025, https://arxiv.org/abs/2512.02556, section 3.1 (off-policy
      sequence masking)
    """
    require_same_shape(2, logprobs=logprobs, sampling_logprobs=sampling_logprobs, mask=mask)
    require_same_shape(1, advantages=advantages, completions=mask[:, 0])
    fallen = jnp.where(mask, sampling_logprobs, 0.0) - jnp.where(mask, logprobs, 0.0)
    return ((advantages >= 0) | (masked_mean(fallen, mask, axis=1) <= threshold))[:, None]


def high_entropy(entropy: jax.Array, mask: jax.Array, *, fraction: float) -> jax.Array:
    """The tokens of highest entropy: those at or above its (1 - fraction) quantile.

    They are where a completion branches; the others follow from them.

    Args:
      entropy: `[B, T]` nats; the result has no gradient.
      mask: `[B, T]` bool, true on tokens that count; other entries are ignored.
      fraction: ρ, in (0, 1]; the paper's is 0.2.

    Returns:
      `[B, T]` bool, false where masked.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> entropy = jnp.array([[0.1, 0.9, 0.5, jnp.inf]])
      >>> high_entropy(entropy, jnp.array([[True, True, True, False]]), fraction=0.4).tolist()
      [[False, True, False, False]]

    References:
      Wang et al., Beyond the 80/20 Rule, 2025, https://arxiv.org/abs/2506.01939, eq. 5 and 6
    """
    require_same_shape(2, entropy=entropy, mask=mask)
    values = jax.lax.stop_gradient(jnp.where(mask, entropy, jnp.nan))
    return mask & (values >= jnp.nanquantile(values, 1 - fraction))
