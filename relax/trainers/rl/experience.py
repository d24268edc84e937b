"""PPO experience: the arrays that the updates of a rollout train on.

A completion's score and a KL penalty per token give rewards; rewards and values give advantages and
returns:

    r_t = - kl_coef kl_t,   r_e += score,   δ_t = r_t + γ V_{t+1} - V_t,   Â_t = δ_t + γ λ Â_{t+1}

Axes: P prompts, G completions of a group, g of them in a row, C tokens of a completion;
B = P * G completions of a rollout, N = B / g rows.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from relax.data.forest import ROWS
from relax.losses import gae, masked_whiten

LAST_TOKEN, AFTER_EOS = "last_token", "after_eos"
REWARD_AT = (LAST_TOKEN, AFTER_EOS)


@flax.struct.dataclass
class Experience:
    """The batch of an update.

    Attributes:
      tokens: the rows of a packed forest, `places` `[N, g, C]` of completions in them,
        `completion_ids` `[N, g, C]` and `completion_lengths` `[N, g]`.
      sampling_logprobs: `[N, g, C]`, computed by the sampler.
      old_logprobs: `[N, g, C]`, under the policy that sampled the completions.
      values: `[N, g, C]`, by the critic before the first update; entry t is the value of the state
        in which token t was sampled.
      advantages: `[N, g, C]`, whitened over the rollout.
      returns: `[N, g, C]`, the targets of the values.
      mask: `[N, g, C]` bool, the tokens that the policy wrote.
      value_mask: `[N, g, C]` bool, the states whose values are trained.
      kl: `[N]`, the same in every row: the rollout's mean KL per completion, nats.
      value_share: `[N]`, the same in every row: tokens / states over the rows of an update.
    """

    tokens: dict[str, jax.Array]
    sampling_logprobs: jax.Array
    old_logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array
    mask: jax.Array
    value_mask: jax.Array
    kl: jax.Array
    value_share: jax.Array


def as_experience(packed: dict[str, np.ndarray]) -> Experience:
    """The batch of an update from its arrays, those of the forest among them."""
    names = ("sampling_logprobs", "old_logprobs", "values", "advantages", "returns")
    fields: dict = {name: packed[name] for name in (*names, "mask", "value_mask")}
    tokens = (*ROWS, "places", "completion_ids", "completion_lengths")
    # Tokens and states differ by the slots after EOS. Micro-batches weight the whole loss by
    # tokens; this ratio turns the value loss per token back into the mean over the update's states.
    share = packed["mask"].sum() / max(packed["value_mask"].sum(), 1)
    fields |= {
        "tokens": {name: packed[name] for name in tokens if name in packed},
        "kl": packed["mean_kl"][:, 0],
        "value_share": np.full(len(packed["mask"]), share, np.float32),
    }
    return Experience(**fields)


def token_rewards(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    lengths: jax.Array,
    *,
    kl_coef: jax.Array | float,
    reward_at: str = LAST_TOKEN,
) -> tuple[jax.Array, jax.Array]:
    """Computes rewards per token, and the states that have a value.

        r_t = -kl_coef kl_t,   r_e += score

    Args:
      scores: `[B]`, finite.
      kl: `[B, C]`, KL estimates per token, nats.
      mask: `[B, C]` bool, the tokens that the policy wrote; a completion without any gets no
        reward.
      lengths: `[B]`, number of tokens of each completion, 1 to C.
      kl_coef: KL coefficient (>= 0).
      reward_at: `last_token`: e is the last token that the policy wrote. `after_eos`: e is the slot
        after the completion, whose state has seen all of it, as in TRL's PPO; it has a value too.
        If C has no such slot, e is the last token.

    Returns:
      `[B, C]` rewards, 0 outside the mask, and `[B, C]` bool, the states with a value.
    """
    places = jnp.arange(mask.shape[1])[None, :]
    has_any = mask.any(axis=1)[:, None]
    last = jnp.where(mask, places, -1).max(axis=1)
    if reward_at == AFTER_EOS:
        last = jnp.where(lengths < mask.shape[1], lengths, last)
    is_scored = (places == last[:, None]) & has_any
    rewards = jnp.where(mask, -kl_coef * kl, 0.0) + jnp.where(is_scored, scores[:, None], 0.0)
    return rewards, mask | is_scored


@functools.partial(jax.jit, static_argnames=("reward_at", "whiten_rewards", "gamma", "lam"))
def advantages_and_returns(
    scores: jax.Array,
    kl: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    lengths: jax.Array,
    kl_coef: jax.Array | float,
    *,
    reward_at: str = LAST_TOKEN,
    whiten_rewards: bool = False,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> dict[str, jax.Array]:
    """Computes advantages and returns of a rollout.

    Args:
      scores, kl, mask, lengths, kl_coef, reward_at: as for `token_rewards`.
      values: `[B, C]`; entry t is the value of the state in which token t was sampled.
      whiten_rewards: scale the rollout's rewards to unit variance; they keep their mean.
      gamma, lam: as for `gae`.

    Returns:
      `[B, C]` each: `rewards`, `returns`, `advantages` (whitened over all tokens of the rollout, 0
      outside the mask), and the bool `value_mask`.
    """
    rewards, value_mask = token_rewards(
        scores, kl, mask, lengths, kl_coef=kl_coef, reward_at=reward_at
    )
    if whiten_rewards:
        rewards = masked_whiten(rewards, value_mask, shift_mean=False)
    # Returns use the advantages before whitening: they are targets in reward units.
    advantages, returns = gae(rewards, values, value_mask, gamma=gamma, lam=lam)
    return {
        "rewards": rewards,
        "returns": returns,
        "advantages": masked_whiten(advantages, mask),
        "value_mask": value_mask,
    }


def adapt_kl_coef(
    kl_coef: jax.Array, kl: jax.Array, *, target: float, horizon: float, count: int
) -> jax.Array:
    """Adapts the KL coefficient after a rollout so that the KL approaches a target.

        kl_coef ← kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

    Args:
      kl_coef: the coefficient of the rollout.
      kl: the rollout's mean KL per completion, nats.
      target: KL per completion to approach, nats (> 0).
      horizon: completions over which the coefficient changes by at most 20 %.
      count: n, the number of completions in the rollout.

    References:
      Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019,
      https://arxiv.org/abs/1909.08593, section 2.2
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * count / horizon)


def mean_per_completion(values: np.ndarray, score: np.ndarray) -> float:
    """Mean over the completions that have a score of their sum over tokens.

    Args:
      values: `[..., C]`, 0 where masked.
      score: `[...]`, NaN if missing.

    Returns:
      The mean; 0 if no completion has a score.
    """
    sums = values.sum(axis=-1)[~np.isnan(score)]
    return float(sums.mean()) if sums.size else 0.0


def experience_metrics(experience: dict[str, np.ndarray]) -> dict[str, float | int]:
    """TRL's PPO metrics of a rollout, over completions with a score.

    `objective/...` are means over completions, `kl` and the rewards of sums over tokens;
    `val/explained_variance` is 1 - Var(R - V) / Var(R) over states, omitted if all returns are
    equal.
    """
    e, score = experience, experience["score"]  # NaN: no reward function applied
    kl_coef, kl = float(e["kl_coef"].flat[0]), mean_per_completion(e["kl"], score)
    mean_score = float(score[~np.isnan(score)].mean()) if (~np.isnan(score)).any() else 0.0
    metrics = {
        "episode": int(score.size),
        "objective/kl": kl,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/kl_coef": kl_coef,
        "objective/scores": mean_score,
        "objective/rlhf_reward": mean_score - kl_coef * kl,
    }
    returns, values = (e[name][e["value_mask"]] for name in ("returns", "values"))
    if returns.size and returns.var() > 0:
        left = float((returns - values).var() / returns.var())
        metrics["val/explained_variance"] = 1.0 - left
    return metrics
