"""Group relative policy optimisation, and the family of losses that grew out of it.

1. `generate`: every prompt gets a group of G completions (`RLTrainer`).
2. `score`: reward functions judge them (`RLTrainer`).
3. `advantages`: each completion's reward against those of its group.
4. `compute_loss`: the clipped policy-gradient loss, and a KL penalty to a reference policy.

    Â_i = (r_i - mean(r)) / std(r),   ρ_t = π_θ(y_t) / π_old(y_t)
    L = - Σ_t min(ρ_t Â, clip(ρ_t, 1 - ε, 1 + ε) Â) / #tokens + β KL(π_θ ‖ π_ref)

Shao et al., DeepSeekMath, 2024, section 4.1. A subclass that changes only the advantage:

    class MyTrainer(GRPOTrainer):
        def advantages(self, rewards):  # [P, G]
            return rewards - jnp.nanmedian(rewards, axis=1, keepdims=True)

Where it departs from TRL: dapo and bnpo divide by the tokens of the update, whatever the size of a
micro-batch or of a rollout; cispo clips to the paper's interval (`cispo_absolute` is TRL's).

Axes: P prompts, G completions of a group, g of them in a row, C tokens of a completion;
B = P * g completions of a batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses.advantages import ADVANTAGES
from relax.losses.kl import KL_ESTIMATORS, kl_estimate
from relax.losses.masked import masked_mean
from relax.losses.policy import LOSS_TYPES, RATIOS, Clip, clip_fractions, log_ratios, policy_loss
from relax.trainers.rl.rollout import concatenate
from relax.trainers.rl_trainer import RESAMPLING, RLTrainer, ScoredRollout, difference_metrics
from relax.trainers.state import TrainState, reference_params, update_reference
from relax.trainers.update import LossOutput, Max, Mean, Min


class GRPOTrainer(RLTrainer):
    """GRPO, and with other options DAPO, Dr. GRPO, GSPO, CISPO and RLOO.

    Args:
      model, optimizer, reward_funcs, tokenizer, **options: as for `RLTrainer`.
      beta: of the KL penalty; 0 holds no reference.
      kl_estimator: `k1`, `k2` or `k3`.
      kl_in_reward: the penalty, summed over a completion's tokens, is taken off its reward instead.
      epsilon, epsilon_high, delta: bounds of the ratio, see `Clip`; epsilon_high None: epsilon.
      loss_type: of `LOSS_TYPES`: dapo, grpo, bnpo, dr_grpo, cispo, cispo_absolute.
      importance_sampling_level: `token`, `sequence` (GSPO) or `trajectory` (RLOO).
      scale_rewards: of `ADVANTAGES`: group, batch, none, or rloo.
      mask_truncated_completions: those that did not end by themselves are not trained on.
      entropy_coef: of the tokens' entropy, which is taken off their losses.
      max_resample_rounds: how often groups whose rewards are all equal are replaced by those of
        fresh prompts, from the item's `extra_prompts` (DAPO's dynamic sampling); 0: never.
      sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: every so many updates the
        reference becomes alpha times the policy plus (1 - alpha) times itself.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        beta: float = 0.0,
        kl_estimator: str = "k3",
        kl_in_reward: bool = False,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        loss_type: str = "dapo",
        importance_sampling_level: str = "token",
        scale_rewards: str = "group",
        mask_truncated_completions: bool = False,
        entropy_coef: float = 0.0,
        max_resample_rounds: int = 0,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        **options,
    ):
        super().__init__(model, optimizer, reference=beta != 0, **options)
        if self.num_generations < 2:
            raise ValueError(
                "num_generations must be at least 2, since advantages are against the group, got "
                f"{self.num_generations}."
            )
        for name, value, known in (
            ("loss_type", loss_type, LOSS_TYPES),
            ("importance_sampling_level", importance_sampling_level, RATIOS),
            ("scale_rewards", scale_rewards, ADVANTAGES),
            ("kl_estimator", kl_estimator, KL_ESTIMATORS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}. Known: {', '.join(known)}.")
        self.beta, self.kl_estimator, self.kl_in_reward = beta, kl_estimator, kl_in_reward
        high = epsilon if epsilon_high is None else epsilon_high
        self.clip = Clip(epsilon, high, delta)
        self.loss_type, self.ratio = loss_type, RATIOS[importance_sampling_level]
        self.scale_rewards = scale_rewards
        self.mask_truncated_completions = mask_truncated_completions
        self.entropy_coef, self.max_resample_rounds = entropy_coef, max_resample_rounds
        if sync_ref_model and (not beta or model.lora is not None):
            raise ValueError(
                "sync_ref_model needs a reference with weights of its own: beta above 0, and no "
                f"adapters, got beta {beta} and lora {model.lora}."
            )
        self.sync_ref_model = sync_ref_model
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.ref_model_sync_steps = ref_model_sync_steps

    def advantages(self, rewards: jax.Array) -> jax.Array:
        """Each completion's reward against its group's: `[P, G]` -> `[P, G]`.

        A reward is NaN where no function applies; whatever is returned there counts as 0.
        """
        return ADVANTAGES[self.scale_rewards](rewards)

    def collect(self, state: TrainState, item, key: jax.Array) -> ScoredRollout:
        """As `RLTrainer`'s; then groups without variance are replaced, where that is asked for."""
        kept = super().collect(state, item, key)
        size, metrics = len(item["rows"]), dict(kept.metrics)
        extra_prompts = item.get("extra_prompts", {"prompt_ids": [], "rows": []})
        replaced, drawn = 0, kept.rewards[~np.isnan(kept.rewards)]
        if self.max_resample_rounds and drawn.size:
            metrics["reward_drawn"] = float(drawn.mean())
        for attempt in range(self.max_resample_rounds):
            flat = np.flatnonzero(has_zero_std(kept.rewards))
            first = attempt * size
            fresh_item = {
                name: extra_prompts[name][first : first + len(flat)] for name in extra_prompts
            }
            if not fresh_item["rows"]:
                break
            fresh_key = jax.random.fold_in(self._key(state, RESAMPLING), attempt)
            fresh = super().collect(state, fresh_item, fresh_key)
            kept, count = _replace(kept, fresh, flat)
            replaced += count
            for name in ("time/rollout", "time/reward", "reward_errors"):
                metrics[name] += fresh.metrics[name]
        if self.max_resample_rounds:
            metrics["resampled_groups"] = replaced
        return kept._replace(metrics=metrics)

    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        rollout, rewards = collected.rollout, collected.rewards
        mask = rollout.mask
        if self.mask_truncated_completions:
            mask = mask & ~rollout.truncated[:, :, None]
        arrays = {"mask": mask, "old_logprobs": self.old_logprobs(state, rollout)}
        arrays["sampling_logprobs"] = rollout.logprobs
        if self.beta:
            ref_logprobs = self.token_logprobs(reference_params(state.frozen), rollout)
            if self.kl_in_reward:
                old_logprobs = arrays["old_logprobs"]
                kl = kl_estimate(old_logprobs, ref_logprobs, rollout.mask, self.kl_estimator)
                rewards = rewards - self.beta * np.asarray(kl).sum(axis=2)
            arrays["ref_logprobs"] = ref_logprobs
        advantages = np.asarray(self.advantages(jnp.asarray(rewards, jnp.float32)), np.float32)
        return arrays | {"advantages": np.where(np.isnan(rewards), np.float32(0), advantages)}

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        weights = self.model_params(params, frozen or {})
        (logprobs, entropy), aux_loss = self.completion_logprobs(weights, batch, rng)
        C = logprobs.shape[-1]
        flat = {name: batch[name].reshape(-1, C) for name in ("mask", "old_logprobs")}
        logprobs, entropy = logprobs.reshape(-1, C), entropy.reshape(-1, C)  # [B, C]
        mask, advantages = flat["mask"], batch["advantages"].reshape(-1)
        ratio = self.ratio(log_ratios(logprobs, flat["old_logprobs"], mask), mask)
        # No product with a coefficient of 0: the entropy's gradient is as dear as the loss's.
        penalty, metrics = (-self.entropy_coef * entropy if self.entropy_coef else 0.0), {}
        if self.beta:
            ref_logprobs = batch["ref_logprobs"].reshape(-1, C)
            kl = kl_estimate(logprobs, ref_logprobs, mask, self.kl_estimator)
            metrics["kl"] = Mean(masked_mean(kl, mask), mask.sum())
            penalty += 0.0 if self.kl_in_reward else self.beta * kl
        loss, weight = policy_loss(
            logprobs,
            ratio,
            advantages,
            mask,
            loss_type=self.loss_type,
            clip=self.clip,
            penalty=penalty,
            max_length=self.sampling.max_new_tokens,
        )
        metrics["entropy"] = Mean(masked_mean(entropy, mask), mask.sum())
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        metrics |= self._clip_metrics(ratio, advantages, mask)
        sampled = batch["sampling_logprobs"].reshape(-1, C)
        metrics |= difference_metrics(logprobs, sampled, mask)
        return LossOutput(loss=loss, weight=weight, metrics=metrics)

    def update_frozen(self, frozen, params, step):
        if not self.sync_ref_model or "ref" not in frozen:
            return frozen
        every = self.ref_model_sync_steps
        return update_reference(frozen, params, step, alpha=self.ref_model_mixup_alpha, every=every)

    def _clip_metrics(self, ratio, advantages, mask) -> dict:
        tokens, clipped = mask.sum(), clip_fractions(ratio, advantages, mask, self.clip)
        shares = {name: masked_mean(where, mask, axis=1) for name, where in clipped.items()}
        region = clipped["low"] | clipped["high"]
        return {
            "clip_ratio/low_mean": Mean(masked_mean(clipped["low"], mask), tokens),
            "clip_ratio/low_min": Min(shares["low"].min()),
            "clip_ratio/high_mean": Mean(masked_mean(clipped["high"], mask), tokens),
            "clip_ratio/high_max": Max(shares["high"].max()),
            "clip_ratio/region_mean": Mean(masked_mean(region, mask), tokens),
        }


def has_zero_std(rewards: np.ndarray) -> np.ndarray:
    """`[P]` bool: the rewards of a group `[P, G]` are all equal, or fewer than two apply."""
    highest = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    lowest = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    return ~(highest - lowest > 1e-6)


def _replace(
    kept: ScoredRollout, fresh: ScoredRollout, flat: np.ndarray
) -> tuple[ScoredRollout, int]:
    """Puts fresh groups that have variance in the places of those that have none."""
    good = np.flatnonzero(~has_zero_std(fresh.rewards))
    source = np.arange(len(kept.rewards))
    source[flat[: len(good)]] = len(kept.rewards) + good
    both = ScoredRollout(
        concatenate([kept.rollout, fresh.rollout]),
        np.concatenate([kept.rewards, fresh.rewards]),
        np.concatenate([kept.by_function, fresh.by_function]),
        {
            name: np.concatenate([values, fresh.extras[name]])
            for name, values in kept.extras.items()
            if name in fresh.extras
        },
        kept.metrics,
    )
    return both.take(source), len(good)
