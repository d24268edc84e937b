"""Agreement of the sampler's and the trainer's log-probabilities."""

import jax
import jax.numpy as jnp

from relax.losses import log_ratios, masked_mean
from relax.trainers.update import Max, Mean


def difference_metrics(logprobs: jax.Array, sampled: jax.Array, mask: jax.Array) -> dict:
    """Absolute differences of the two log-probabilities, under TRL's metric names.

    Args:
      logprobs, sampled, mask: `[B, C]`.
    """
    difference = jnp.abs(log_ratios(logprobs, sampled, mask))
    return {
        "sampling/logp_difference/mean": Mean(masked_mean(difference, mask), mask.sum()),
        "sampling/logp_difference/max": Max(jnp.where(mask, difference, 0.0).max()),
    }
