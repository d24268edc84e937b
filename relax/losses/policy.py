"""The clipped-surrogate family of policy losses, taken apart into pure functions.

    ρ = ratio(log π_θ - log π_old)                     `RATIOS`        token, sequence
    l = objective(ρ, Â, log π_θ)     per token         `OBJECTIVES`    clipped, cispo
    L = aggregate(l + β kl, mask)                      `AGGREGATIONS`  token_mean, ...

`LOSS_TYPES` names the compositions that have a name. An own part is registered from anywhere:

    OBJECTIVES["mine"] = lambda ratio, advantages, logprobs, clip: -ratio * advantages
    LOSS_TYPES["mine"] = ("mine", "token_mean")

Log-ratios are zeroed where masked before anything is exponentiated, so padding may hold anything.

Axes: B completions, T tokens of a completion.
"""

import dataclasses

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean, masked_sum


@dataclasses.dataclass(frozen=True)
class Clip:
    """The bounds of the ratio.

    Attributes:
      low, high: the ratio's interval is [1 - low, 1 + high]. `high` above `low` is DAPO's
        clip-higher (Yu et al., 2025, eq. 10).
      delta: an upper bound of the ratio where the advantage is negative, above 1 + high
        (Intellect-2, 2025, section 3.4); None: none.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None


def token_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ_t = exp(log π_θ(y_t) - log π_old(y_t)), `[B, T]`."""
    return jnp.exp(log_ratio)


def sequence_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = (π_θ(y) / π_old(y))^(1 / |y|), `[B, 1]`. Zheng et al., GSPO, 2025, eq. 7."""
    return jnp.exp(masked_mean(log_ratio, mask, axis=1))[:, None]


def trajectory_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = π_θ(y) / π_old(y), `[B, 1]`, as RLOO takes it."""
    return jnp.exp(masked_sum(log_ratio, mask, axis=1))[:, None]


def clipped(ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip):
    """-min(ρ Â, clip(ρ, 1 - low, 1 + high) Â); Schulman et al., PPO, 2017, eq. 7."""
    bounded = ratio if clip.delta is None else jnp.minimum(ratio, clip.delta)
    inside = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    return -jnp.minimum(bounded * advantages, inside * advantages)


def cispo(ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip):
    """-sg(clip(ρ, 1 - low, 1 + high)) Â log π_θ: no token loses its gradient.

    MiniMax-M1, 2025, eq. 4 and 5. TRL clamps to `epsilon_high` itself: see `cispo_absolute`.
    """
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high))
    return -weight * advantages * logprobs


def cispo_absolute(ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip):
    """-sg(min(ρ, high)) Â log π_θ, as TRL has it: `high` is the bound itself, 5 say."""
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip.high))
    return -weight * advantages * logprobs


def token_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """Σ m l / Σ m, weight Σ m: every token counts the same (DAPO, eq. 8)."""
    return masked_mean(losses, mask), mask.sum()


def sequence_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """mean over completions of their mean over tokens, weight B (DeepSeekMath, eq. 3)."""
    return masked_mean(losses, mask, axis=1).mean(), mask.shape[0]


def constant_mean(losses: jax.Array, mask: jax.Array, max_length: int):
    """Σ m l / (B · max_length), weight B: no completion's length matters (Dr. GRPO, eq. 2)."""
    return masked_sum(losses, mask) / (mask.shape[0] * max_length), mask.shape[0]


RATIOS = {"token": token_ratio, "sequence": sequence_ratio, "trajectory": trajectory_ratio}
OBJECTIVES = {"clipped": clipped, "cispo": cispo, "cispo_absolute": cispo_absolute}
AGGREGATIONS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_mean": constant_mean,
}
# Objective and aggregation. TRL's bnpo divides by the tokens of a micro-batch and its dapo by those
# of a generation; here both divide by those of the update, and are the same.
LOSS_TYPES = {
    "grpo": ("clipped", "sequence_mean"),
    "bnpo": ("clipped", "token_mean"),
    "dr_grpo": ("clipped", "constant_mean"),
    "dapo": ("clipped", "token_mean"),
    "cispo": ("cispo", "token_mean"),
    "cispo_absolute": ("cispo_absolute", "token_mean"),
}


def log_ratios(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """log π_θ - log π_old per token, 0 where masked."""
    return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, old_logprobs, 0.0)


def policy_loss(
    logprobs: jax.Array,
    ratio: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    loss_type: str = "dapo",
    clip: Clip = Clip(),  # noqa: B008
    penalty: jax.Array | None = None,
    max_length: int = 1,
):
    """The loss of a batch of completions, and the weight that makes means of it exact.

    Args:
      logprobs: `[B, T]` of the tokens, nats.
      ratio: `[B, T]` or `[B, 1]`, see `RATIOS`.
      advantages: `[B]`, or `[B, T]` per token.
      mask: `[B, T]` bool, the tokens that the policy wrote.
      loss_type: of `LOSS_TYPES`.
      clip: the ratio's bounds.
      penalty: `[B, T]`, added per token, such as β times a KL estimate.
      max_length: tokens that a completion may have, for `dr_grpo`.

    Returns:
      `(loss, weight)` scalars.

    Raises:
      ValueError: an unknown loss_type.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}. Known: {', '.join(LOSS_TYPES)}.")
    objective, aggregation = LOSS_TYPES[loss_type]
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    real_logprobs = jnp.where(mask, logprobs, 0.0)
    ratio, advantages = jnp.broadcast_arrays(ratio, advantages)
    losses = OBJECTIVES[objective](ratio, advantages, real_logprobs, clip)
    if penalty is not None:
        losses = losses + penalty
    losses = jnp.broadcast_to(losses, mask.shape)
    return AGGREGATIONS[aggregation](losses, mask, max_length)


def clip_fractions(ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip: Clip) -> dict:
    """Where the ratio has left its interval on the side that the clipped objective cuts.

    Returns:
      `[B, T]` bool each, false where masked: `low` (ρ < 1 - low and Â < 0) and `high`
      (ρ > 1 + high and Â > 0).
    """
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    low = (ratio < 1.0 - clip.low) & (advantages < 0)
    high = (ratio > 1.0 + clip.high) & (advantages > 0)
    return {"low": low & mask, "high": high & mask}
