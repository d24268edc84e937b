"""Correction of updates whose completions another distribution than the policy's has sampled.

A sampler in bfloat16 draws from μ, which differs a little from the policy π_old of the trainer.
Multiplied by π_old / μ, each token's gradient is unbiased again; a bound keeps the variance finite.

    w_t = min(π_old(y_t) / μ(y_t), c)

Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025
(truncated importance sampling). TRL 1.16 calls the modes by the same names.
"""

import jax
import jax.numpy as jnp

from relax.losses.ratios import log_ratios

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_weights(
    old_logprobs: jax.Array,
    sampling_logprobs: jax.Array,
    mask: jax.Array,
    *,
    mode: str = "token_truncate",
    clip_max: float = 3.0,
) -> jax.Array:
    """Weights of the tokens of completions: π_old / μ, bounded from above.

    Args:
      old_logprobs: `[B, T]` of the tokens under the policy before the update, nats.
      sampling_logprobs: `[B, T]` of the same tokens as they were sampled, nats.
      mask: `[B, T]` bool, true on the policy's tokens; other entries are ignored.
      mode: `token_...`: one ratio per token; `sequence_...`: their product over the completion.
        `..._truncate`: ratios above the bound become it; `..._mask`: they become 0.
      clip_max: the bound c (> 0).

    Returns:
      `[B, T]`, 1 where masked; no gradient flows through it.

    Example:
      >>> old, sampled = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.1, 0.5]]))
      >>> mask = jnp.array([[True, True]])
      >>> sampler_weights(old, sampled, mask).tolist()
      [[3.0, 1.0]]
      >>> sampler_weights(old, sampled, mask, mode="sequence_mask").tolist()
      [[0.0, 0.0]]
    """
    if mode not in CORRECTIONS:
        raise ValueError(f"mode must be one of {', '.join(CORRECTIONS)}, got {mode!r}.")
    log_ratio = log_ratios(old_logprobs, sampling_logprobs, mask)
    if mode.startswith("sequence"):
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=1, keepdims=True), mask.shape)
    ratio = jnp.exp(log_ratio)  # infinite at most, which the bound replaces
    above = 0.0 if mode.endswith("mask") else clip_max
    weights = jnp.where(ratio > clip_max, above, ratio)
    return jax.lax.stop_gradient(jnp.where(mask, weights, 1.0))
