"""Probability ratios of the trained policy to the one that drew the tokens, and their bounds.

    ρ = exp(log π_θ - log π_old)

Log-ratios are masked to 0 *before* the exponential, so values of padding do not matter; a mask
after it would leave 0 · inf = NaN in the gradient.

Axes: B completions, T tokens of a completion.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean, masked_sum
from relax.losses.registry import Registry
from relax.losses.shapes import require_same_shape

# The exponent of a ratio is clamped to this: e^88.8 is infinite in float32, and even where clipping
# removes the gradient of the ratio, 0 · inf would be NaN. verl and OpenRLHF clamp it at 20 too. A
# ratio of e^20 is far outside any clip interval, so only the gradient of unclipped tokens (A < 0
# without `delta`) differs from the formula: it is 0 beyond the bound.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class Clip:
    """Bounds of the probability ratio.

    Attributes:
      low, high: the ratio's interval is [1 - low, 1 + high]. `high` above `low` is DAPO's
        clip-higher (Yu et al., DAPO, 2025, https://arxiv.org/abs/2503.14476, eq. 10).
      delta: upper bound of the ratio for negative advantages, above 1 + high; None: none
        (Prime Intellect, INTELLECT-2, 2025, https://arxiv.org/abs/2505.07291, section 3.4; Ye et
        al., 2020, https://arxiv.org/abs/1912.09729, eq. 5, dual-clip PPO).
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None


RATIOS: Registry[Callable[[jax.Array, jax.Array], jax.Array]] = Registry(
    "importance_sampling_level"
)


@RATIOS.register("token")
def token_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ_t = exp(log π_θ(y_t) - log π_old(y_t)), one per token.

    Args:
      log_ratio: `[B, T]` nats, 0 where masked (`log_ratios`).
      mask: `[B, T]` bool.

    Returns:
      `[B, T]`, at most e^20.
    """
    del mask
    return bounded_exp(log_ratio)


@RATIOS.register("sequence")
def sequence_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = (π_θ(y) / π_old(y))^(1 / |y|), one per completion.

    Args and range as for `token_ratio`; returns `[B, 1]`.

    References:
      Zheng et al., GSPO, 2025, https://arxiv.org/abs/2507.18071, eq. 7
    """
    return bounded_exp(masked_mean(log_ratio, mask, axis=1))[:, None]


@RATIOS.register("trajectory")
def trajectory_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = π_θ(y) / π_old(y), one per completion, as in RLOO.

    Args and range as for `token_ratio`; returns `[B, 1]`.

    References:
      Ahmadian et al., Back to Basics, 2024, https://arxiv.org/abs/2402.14740, section 3.2
    """
    return bounded_exp(masked_sum(log_ratio, mask, axis=1))[:, None]


def bounded_exp(log_ratio):
    """exp(x), x clamped to ±`MAX_LOG_RATIO`."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def log_ratios(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """log π_θ - log π_old per token, 0 where masked.

    Args:
      logprobs, old_logprobs: `[B, T]` nats; masked entries are ignored.
      mask: `[B, T]` bool. Any shape common to the three works.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> log_ratios(jnp.array([-1.0, jnp.nan]), jnp.array([-1.5, 0.0]), jnp.array([True, False]))
      Array([0.5, 0. ], dtype=float32)
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, old_logprobs, 0.0)


def ratio_interval(clip: Clip) -> tuple[float, float]:
    """[1 - low, 1 + high]."""
    return 1.0 - clip.low, 1.0 + clip.high


def log_interval(clip: Clip) -> tuple[jax.Array, jax.Array]:
    """[e^-low, e^high], for objectives that clip log-ratios."""
    return jnp.exp(-clip.low), jnp.exp(clip.high)
