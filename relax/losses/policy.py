"""The clipped-surrogate family of policy losses, as a composition of pure functions.

    ρ = exp(log π_θ - log π_old)                       `RATIOS`        token, sequence, trajectory
    l = objective(ρ, Â, log π_θ)       per token
    L = aggregation(l + penalty, mask)                 `AGGREGATIONS`  token_mean, ...

`LOSS_TYPES` has the named pairs of objective and aggregation. To add your own:

    @register_loss("mine", aggregation="token_mean")
    def mine(ratio, advantages, logprobs, clip):  # [B, T] each, except clip
        return -ratio * advantages

Log-ratios are masked to 0 *before* the exponential, so values of padding do not matter; a mask
after it would leave 0 · inf = NaN in the gradient.

Axes: B completions, T tokens of a completion.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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
    return _exp(log_ratio)


@RATIOS.register("sequence")
def sequence_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = (π_θ(y) / π_old(y))^(1 / |y|), one per completion.

    Args and range as for `token_ratio`; returns `[B, 1]`.

    References:
      Zheng et al., GSPO, 2025, https://arxiv.org/abs/2507.18071, eq. 7
    """
    return _exp(masked_mean(log_ratio, mask, axis=1))[:, None]


@RATIOS.register("trajectory")
def trajectory_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """ρ = π_θ(y) / π_old(y), one per completion, as in RLOO.

    Args and range as for `token_ratio`; returns `[B, 1]`.

    References:
      Ahmadian et al., Back to Basics, 2024, https://arxiv.org/abs/2402.14740, section 3.2
    """
    return _exp(masked_sum(log_ratio, mask, axis=1))[:, None]


def _exp(log_ratio):
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


Objective = Callable[[jax.Array, jax.Array, jax.Array, Clip], jax.Array]
Aggregation = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array | int]]


def clipped(ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip) -> jax.Array:
    """-min(ρ Â, clip(ρ, 1 - low, 1 + high) Â) per token.

    Args:
      ratio, advantages, logprobs: `[B, T]`, or shapes that broadcast to it.
      clip: bounds of the ratio.

    Returns:
      `[B, T]` losses.

    References:
      Schulman et al., PPO, 2017, https://arxiv.org/abs/1707.06347, eq. 7
    """
    del logprobs
    bounded = ratio if clip.delta is None else jnp.minimum(ratio, clip.delta)
    inside = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    return -jnp.minimum(bounded * advantages, inside * advantages)


def cispo(ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip) -> jax.Array:
    """-sg(clip(ρ, 1 - low, 1 + high)) Â log π_θ: no token loses its gradient.

    Args and result as for `clipped`. TRL's bound is `epsilon_high` itself: `cispo_absolute`.

    References:
      MiniMax, MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5
    """
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high))
    return -weight * advantages * logprobs


def cispo_absolute(
    ratio: jax.Array, advantages: jax.Array, logprobs: jax.Array, clip: Clip
) -> jax.Array:
    """-sg(min(ρ, high)) Â log π_θ, as in TRL: `high` is the bound itself, such as 5.

    Args and result as for `clipped`.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip.high))
    return -weight * advantages * logprobs


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


class LossType(NamedTuple):
    """A policy loss: losses per token, and their aggregation."""

    objective: Objective
    aggregation: Aggregation


LOSS_TYPES: Registry[LossType] = Registry("loss_type")


def register_loss(
    name: str, *, aggregation: str | Aggregation = "token_mean"
) -> Callable[[Objective], Objective]:
    """Decorator that registers an objective as a `loss_type`.

    Args:
      name: its name in `policy_loss` and `GRPOTrainer`.
      aggregation: a name in `AGGREGATIONS`, or a function like those.

    Example:
      >>> @register_loss("reinforce", aggregation="sequence_mean")
      ... def reinforce(ratio, advantages, logprobs, clip):
      ...     return -advantages * logprobs
      >>> LOSS_TYPES.pop("reinforce").objective is reinforce
      True
    """
    chosen = AGGREGATIONS[aggregation] if isinstance(aggregation, str) else aggregation

    def add(objective: Objective) -> Objective:
        LOSS_TYPES[name] = LossType(objective, chosen)
        return objective

    return add


register_loss("grpo", aggregation="sequence_mean")(clipped)
# TRL's bnpo divides by the tokens of a micro-batch and its dapo by those of a generation; here both
# divide by those of the update and are the same.
register_loss("bnpo")(clipped)
register_loss("dr_grpo", aggregation="constant_mean")(clipped)
register_loss("dapo")(clipped)
register_loss("cispo")(cispo)
register_loss("cispo_absolute")(cispo_absolute)


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


class PolicyLoss(NamedTuple):
    """The loss of a batch of completions.

    Attributes:
      loss: scalar.
      weight: scalar, the tokens or completions that `loss` is the mean of: Σ w L / Σ w over
        micro-batches is the loss of the whole.
      ratio: `[B, T]`, or `[B, 1]` for ratios per completion; 1 where masked.
    """

    loss: jax.Array
    weight: jax.Array
    ratio: jax.Array


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    clip: Clip = Clip(),  # noqa: B008
    penalty: jax.Array | None = None,
    kl: jax.Array | None = None,
    unbiased_kl: bool = False,
    max_length: int | None = None,
) -> PolicyLoss:
    """Loss of PPO, GRPO and related algorithms, by default that of DAPO:

        ρ_t = π_θ(y_t) / π_old(y_t)
        L = - Σ_t min(ρ_t Â, clip(ρ_t, 1 - low, 1 + high) Â) / #tokens

    Args:
      logprobs: `[B, T]` of the tokens under the policy that is trained, nats.
      old_logprobs: `[B, T]` of the same tokens under the policy that drew them, nats.
      advantages: `[B]` per completion, or `[B, T]` per token.
      mask: `[B, T]` bool, true on the policy's tokens; other entries are ignored.
      loss_type: a name in `LOSS_TYPES`: `dapo`, `grpo`, `bnpo`, `dr_grpo`, `cispo`,
        `cispo_absolute`, or one of your own (`register_loss`).
      importance_sampling_level: a name in `RATIOS`: `token`, `sequence` (GSPO) or `trajectory`.
      clip: bounds of the ratio.
      penalty: `[B, T]`, added per token, such as -c times the entropy.
      kl: `[B, T]`, β times a KL estimate, added per token.
      unbiased_kl: multiply `kl` by the ratio. The tokens were drawn by the old policy, and
        E_old[ρ k] = E_θ[k] (DeepSeek-AI, DeepSeek-V3.2, 2025, https://arxiv.org/abs/2512.02556,
        section 3.1).
      max_length: tokens that a completion may have, for `dr_grpo`; None: T.

    Returns:
      A `PolicyLoss`: the loss, its weight, the ratio.

    Raises:
      ValueError: an unknown name, or shapes that do not fit.

    Example:
      >>> logprobs = jnp.log(jnp.array([[0.5, 0.25], [0.5, 0.5]]))
      >>> mask = jnp.array([[True, True], [True, False]])
      >>> loss, weight, ratio = policy_loss(logprobs, logprobs, jnp.array([1.0, -1.0]), mask)
      >>> round(loss.item(), 4), weight.item(), ratio.tolist()
      (-0.3333, 3, [[1.0, 1.0], [1.0, 1.0]])

    References:
      Yu et al., DAPO, 2025, https://arxiv.org/abs/2503.14476, eq. 8; others: see the parts.
    """
    objective, aggregation = LOSS_TYPES[loss_type]
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    require_same_shape(2, mask=mask, penalty=penalty, kl=kl)
    ratio = RATIOS[importance_sampling_level](log_ratio, mask)
    per_token, advantages = jnp.broadcast_arrays(ratio, _per_token(advantages, mask))
    losses = objective(per_token, advantages, jnp.where(mask, logprobs, 0.0), clip)
    if penalty is not None:
        losses = losses + penalty
    if kl is not None:
        losses = losses + (ratio * kl if unbiased_kl else kl)
    losses = jnp.broadcast_to(losses, mask.shape)
    loss, weight = aggregation(losses, mask, max_length or mask.shape[1])
    return PolicyLoss(loss, jnp.asarray(weight), ratio)


def clip_fractions(ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip: Clip) -> dict:
    """Tokens whose ratio has left its interval on the side that the clipped objective cuts.

    Args:
      ratio: `[B, T]` or `[B, 1]`.
      advantages: `[B]` or `[B, T]`.
      mask: `[B, T]` bool.
      clip: bounds of the ratio.

    Returns:
      `[B, T]` bool each, false where masked: `low` (ρ < 1 - low and Â < 0) and `high`
      (ρ > 1 + high and Â > 0).

    Example:
      >>> ratio, mask = jnp.array([[0.5, 1.5]]), jnp.array([[True, True]])
      >>> clip_fractions(ratio, jnp.array([1.0]), mask, Clip())["high"].tolist()
      [[False, True]]
    """
    advantages = _per_token(advantages, mask)
    low = (ratio < 1.0 - clip.low) & (advantages < 0)
    high = (ratio > 1.0 + clip.high) & (advantages > 0)
    return {"low": low & mask, "high": high & mask}


def _per_token(advantages, mask):
    """`[B]` -> `[B, 1]`; masked entries of `[B, T]` become 0."""
    if advantages.ndim == 1:
        require_same_shape(1, advantages=advantages, completions=mask[:, 0])
        return advantages[:, None]
    require_same_shape(2, advantages=advantages, mask=mask)
    return jnp.where(mask, advantages, 0.0)
