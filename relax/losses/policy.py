"""Policy losses of GRPO and related algorithms, as a composition of pure functions.

    ρ = exp(log π_θ - log π_old)                       `RATIOS`        token, sequence, trajectory
    l = objective(tokens, options)     per token       `LOSS_TYPES`    dapo, sapo, gmpo, ...
    L = aggregation(l + penalty, mask)                 `AGGREGATIONS`  token_mean, ...

A `loss_type` is an objective and its aggregation. To add your own:

    @register_loss("mine", aggregation="token_mean")
    def mine(tokens, options):  # -> [B, T]
        return -tokens.ratio * tokens.advantages

Axes: B completions, T tokens of a completion.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from relax.losses.aggregation import AGGREGATIONS, Aggregation
from relax.losses.ratios import RATIOS, Clip, log_ratios, ratio_interval
from relax.losses.registry import Registry
from relax.losses.shapes import require_same_shape


class Tokens(NamedTuple):
    """The tokens of a batch of completions, `[B, T]` each, as an objective gets them.

    Attributes:
      ratio: ρ, or `[B, 1]` for ratios per completion; 1 where masked.
      advantages: Â, or `[B, 1]`.
      logprobs: log π_θ, nats; 0 where masked.
      old_logprobs: log π_old, nats; 0 where masked.
      mask: bool, true on the policy's tokens.
      key: for objectives that draw tokens at random; None: no randomness.
    """

    ratio: jax.Array
    advantages: jax.Array
    logprobs: jax.Array
    old_logprobs: jax.Array
    mask: jax.Array
    key: jax.Array | None


class PolicyOptions(NamedTuple):
    """Hyperparameters of the policy losses; each loss reads some of them.

    Attributes:
      clip: bounds of the ratio.
      sapo_temperature_pos, sapo_temperature_neg: τ of SAPO for Â > 0 and Â <= 0, above 0.
      vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and λ of VESPO for Â >= 0 and
        Â < 0, at least 0.
      clip_cov_ratio, clip_cov_lb, clip_cov_ub: share of tokens that Clip-Cov drops, in (0, 1], and
        the bounds of their covariance.
      kl_cov_ratio, kl_cov_coef: share of tokens that KL-Cov penalises, in (0, 1], and by how much.
    """

    clip: Clip = Clip()
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 2e-4
    kl_cov_coef: float = 1.0


Objective = Callable[[Tokens, PolicyOptions], jax.Array]


class LossType(NamedTuple):
    """A policy loss.

    Attributes:
      objective: losses per token.
      aggregation: makes the loss of the batch from them.
      level: the name in `RATIOS` that the loss is defined with; None: any.
      reads: the options that it uses, by their names in `GRPOTrainer`.
      vanishes: whether the gradient of a completion of advantage 0 is 0, whatever the others are.
      interval: the interval that it clips ratios to, for metrics; None: it clips none.
    """

    objective: Objective
    aggregation: Aggregation
    level: str | None = None
    reads: tuple[str, ...] = ()
    vanishes: bool = False
    interval: Callable[[Clip], tuple] | None = None


def _loss_type(
    objective: Objective, *, aggregation: str | Aggregation = "token_mean", **properties
) -> LossType:
    chosen = AGGREGATIONS[aggregation] if isinstance(aggregation, str) else aggregation
    return LossType(objective, chosen, **properties)


LOSS_TYPES: Registry[LossType] = Registry("loss_type", _loss_type)


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
    options: PolicyOptions = PolicyOptions(),  # noqa: B008
    penalty: jax.Array | None = None,
    kl: jax.Array | None = None,
    unbiased_kl: bool = False,
    keep: jax.Array | None = None,
    max_length: int | None = None,
    key: jax.Array | None = None,
) -> PolicyLoss:
    """Loss of PPO, GRPO and related algorithms, by default that of DAPO:

        ρ_t = π_θ(y_t) / π_old(y_t)
        L = - Σ_t min(ρ_t Â, clip(ρ_t, 1 - low, 1 + high) Â) / #tokens

    Args:
      logprobs: `[B, T]` of the tokens under the policy that is trained, nats.
      old_logprobs: `[B, T]` of the same tokens under the policy that drew them, nats.
      advantages: `[B]` per completion, or `[B, T]` per token.
      mask: `[B, T]` bool, true on the policy's tokens; other entries are ignored.
      loss_type: a name in `LOSS_TYPES`, such as `dapo` or `sapo`, or one of your own
        (`register_loss`), also as `path/to/file.py:name`.
      importance_sampling_level: a name in `RATIOS`: `token`, `sequence` (GSPO) or `trajectory`; a
        loss that is defined with one of them has that one.
      options: hyperparameters of the losses.
      penalty: `[B, T]`, added per token, such as -c times the entropy.
      kl: `[B, T]`, β times a KL estimate, added per token.
      unbiased_kl: multiply `kl` by the ratio. The tokens were drawn by the old policy, and
        E_old[ρ k] = E_θ[k] (DeepSeek-AI, DeepSeek-V3.2, 2025, https://arxiv.org/abs/2512.02556,
        section 3.1).
      keep: `[B, T]` or `[B, 1]` bool, true on tokens that the objective is computed on; the others
        count in the denominators, with a loss of 0 before `penalty` and `kl`. None: all.
      max_length: tokens that a completion may have, for `dr_grpo`; None: T.
      key: for losses that draw tokens at random (`clip_cov`).

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
    loss_of = LOSS_TYPES[loss_type]
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    require_same_shape(2, mask=mask, penalty=penalty, kl=kl)
    ratio = RATIOS[loss_of.level or importance_sampling_level](log_ratio, mask)
    per_token, advantages = jnp.broadcast_arrays(ratio, _per_token(advantages, mask))
    logprobs, old_logprobs = (jnp.where(mask, x, 0.0) for x in (logprobs, old_logprobs))
    tokens = Tokens(per_token, advantages, logprobs, old_logprobs, mask, key)
    losses = loss_of.objective(tokens, options)
    if keep is not None:
        losses = jnp.where(keep, losses, 0.0)
    if penalty is not None:
        losses = losses + penalty
    if kl is not None:
        losses = losses + (ratio * kl if unbiased_kl else kl)
    losses = jnp.broadcast_to(losses, mask.shape)
    loss, weight = loss_of.aggregation(losses, mask, max_length or mask.shape[1])
    return PolicyLoss(loss, jnp.asarray(weight), ratio)


def clip_fractions(
    ratio: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: Clip,
    interval: Callable[[Clip], tuple] = ratio_interval,
) -> dict:
    """Tokens whose ratio has left its interval on the side that the clipped objective cuts.

    Args:
      ratio: `[B, T]` or `[B, 1]`.
      advantages: `[B]` or `[B, T]`.
      mask: `[B, T]` bool.
      clip: bounds of the ratio.
      interval: `ratio_interval` or `log_interval`.

    Returns:
      `[B, T]` bool each, false where masked: `low` (ρ below the interval and Â < 0) and `high`
      (ρ above it and Â > 0).

    Example:
      >>> ratio, mask = jnp.array([[0.5, 1.5]]), jnp.array([[True, True]])
      >>> clip_fractions(ratio, jnp.array([1.0]), mask, Clip())["high"].tolist()
      [[False, True]]
    """
    advantages = _per_token(advantages, mask)
    lowest, highest = interval(clip)
    low, high = (ratio < lowest) & (advantages < 0), (ratio > highest) & (advantages > 0)
    return {"low": low & mask, "high": high & mask}


def _per_token(advantages, mask):
    """`[B]` -> `[B, 1]`; masked entries of `[B, T]` become 0."""
    if advantages.ndim == 1:
        require_same_shape(1, advantages=advantages, completions=mask[:, 0])
        return advantages[:, None]
    require_same_shape(2, advantages=advantages, mask=mask)
    return jnp.where(mask, advantages, 0.0)
