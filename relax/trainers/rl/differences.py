"""Agreement of the sampler's and the trainer's log-probabilities, and its correction."""

import dataclasses

import jax
import jax.numpy as jnp

from relax.losses import log_ratios, masked_mean, sampler_weights
from relax.trainers.update import Max, Mean, Min


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


@dataclasses.dataclass(frozen=True)
class Correction:
    """Weights of a rollout's tokens, by which the sampler and the policy differ.

    Attributes:
      mode, clip_max: see `sampler_weights`.
    """

    mode: str = "token_truncate"
    clip_max: float = 3.0

    def apply(self, advantages, old_logprobs, sampled, mask) -> tuple[jax.Array, dict]:
        """Advantages times the weights, which multiplies the clipped objective by them.

        Args:
          advantages: `[B]` or `[B, C]`.
          old_logprobs, sampled, mask: `[B, C]`.

        Returns:
          `[B, C]`, and the weights' metrics under TRL's names.
        """
        weights = sampler_weights(
            old_logprobs, sampled, mask, mode=self.mode, clip_max=self.clip_max
        )
        name = "sampling/importance_sampling_ratio"
        tokens = mask.sum()
        of_all = masked_mean(weights, mask)
        squares = jnp.maximum(masked_mean(jnp.square(weights), mask), 1e-30)
        metrics = {
            "sampling/ess": Mean(jnp.square(of_all) / squares, tokens),
            f"{name}/min": Min(jnp.where(mask, weights, jnp.inf).min()),
            f"{name}/mean": Mean(of_all, tokens),
            f"{name}/max": Max(jnp.where(mask, weights, -jnp.inf).max()),
        }
        return advantages.reshape(len(mask), -1) * weights, metrics
