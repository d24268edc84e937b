"""Group relative policy optimisation (GRPO) and related losses.

1. `generate`: every prompt gets a group of G completions (`RLTrainer`).
2. `score`: reward functions score them (`RLTrainer`).
3. `resample`: optionally, groups of equal rewards are replaced (DAPO).
4. `advantages`: each completion's reward relative to its group.
5. `compute_loss`: the clipped policy-gradient loss, and a KL penalty to a reference policy.

    Â_i = (r_i - mean(r)) / std(r),   ρ_t = π_θ(y_t) / π_old(y_t)
    L = - Σ_t min(ρ_t Â, clip(ρ_t, 1 - ε, 1 + ε) Â) / #tokens + β KL(π_θ ‖ π_ref)

Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300, section 4.1. A subclass that
changes only the advantage:

    class MyTrainer(GRPOTrainer):
        def advantages(self, rewards):  # [P, G]
            return rewards - np.nanmedian(rewards, axis=1, keepdims=True)

Differences from TRL: dapo and bnpo divide by the tokens of the update, whatever the size of a
micro-batch or rollout; cispo clips to the paper's interval (`cispo_absolute` is TRL's); the
log-ratio is clamped to ±20 before it is exponentiated, as in verl and OpenRLHF.

Axes: P prompts, G completions of a group, g of them in a row, C tokens of a completion;
B = P * g completions of a batch.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIOS,
    Clip,
    clip_fractions,
    kl_estimate,
    masked_mean,
    policy_loss,
)
from relax.trainers.rl.differences import difference_metrics
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.rollout import concatenate, has_zero_std
from relax.trainers.rl_trainer import (
    RESAMPLING,
    ROLLOUT,
    RLTrainer,
    ScoredRollout,
)
from relax.trainers.state import TrainState, reference_params, update_reference
from relax.trainers.trainer import LoggedBatch
from relax.trainers.update import LossOutput, Max, Mean, Min

# Losses whose gradient vanishes with the advantage.
VANISHING = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "cispo_absolute")


class GRPOTrainer(RLTrainer):
    """Trainer for GRPO and, by its options, DAPO, Dr. GRPO, GSPO, CISPO and RLOO.

    Args:
      model, optimizer, reward_funcs, tokenizer, **options: as for `RLTrainer`.
      beta: KL coefficient β (>= 0); 0 disables the reference model.
      kl_estimator: `k1`, `k2`, `k3`, or a registered one.
      kl_in_reward: subtract the penalty, summed over a completion's tokens, from its reward instead
        of adding it to the loss.
      use_bias_correction_kl: multiply the penalty per token by the ratio (TRL's name and default),
        which estimates the KL of the current policy from tokens sampled by an older one.
      epsilon, epsilon_high, delta: bounds of the ratio, see `Clip`; epsilon_high None: epsilon.
      loss_type: dapo, grpo, bnpo, dr_grpo, cispo, cispo_absolute, or a registered one.
      importance_sampling_level: `token`, `sequence` (GSPO) or `trajectory` (RLOO).
      scale_rewards: group, batch, none or rloo, or a registered advantage.
      mask_truncated_completions: do not train on truncated completions. Their rewards still count
        in their group's mean and standard deviation.
      entropy_coef: coefficient of the entropy bonus, which is subtracted from the loss.
      max_resample_rounds: maximum number of times that groups of equal rewards are replaced by
        groups of the item's `extra_prompts` (DAPO's dynamic sampling); 0: never.
      sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: see `update_reference`.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        beta: float = 0.0,
        kl_estimator: str = "k3",
        kl_in_reward: bool = False,
        use_bias_correction_kl: bool = True,
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
                "num_generations must be at least 2, since advantages are relative to the group, "
                f"got {self.num_generations}."
            )
        for registry, name in (
            (LOSS_TYPES, loss_type),
            (RATIOS, importance_sampling_level),
            (ADVANTAGES, scale_rewards),
            (KL_ESTIMATORS, kl_estimator),
        ):
            registry[name]  # fails on an unknown name here, not in the first update
        self.beta, self.kl_estimator, self.kl_in_reward = beta, kl_estimator, kl_in_reward
        high = epsilon if epsilon_high is None else epsilon_high
        self.clip = Clip(epsilon, high, delta)
        self.use_bias_correction_kl = use_bias_correction_kl
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.scale_rewards = scale_rewards
        self.mask_truncated_completions = mask_truncated_completions
        self.entropy_coef, self.max_resample_rounds = entropy_coef, max_resample_rounds
        if sync_ref_model and (not beta or model.lora is not None):
            raise ValueError(
                "sync_ref_model needs a reference with its own weights: beta above 0 and no "
                f"adapters, got beta {beta} and lora {model.lora}."
            )
        self.sync_ref_model = sync_ref_model
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.ref_model_sync_steps = ref_model_sync_steps

    def advantages(self, rewards: np.ndarray):
        """Each completion's reward relative to its group, `[P, G]` -> `[P, G]`.

        Args:
          rewards: float64 on the host; NaN if no reward function applies, which gives advantage 0.
        """
        return ADVANTAGES[self.scale_rewards](rewards)

    def make_batches(self, state: TrainState, item) -> Iterator[LoggedBatch]:
        with self.rewards.tally.undone_if_interrupted():
            collected = self.collect(state, item, self._key(state, ROLLOUT))  # generate, score
            if self.max_resample_rounds:
                collected = self.resample(state, item, collected)
            experience = self.timed_experience(state, collected)
        yield from self.split_updates(state, collected, *experience)

    def resample(self, state: TrainState, item, collected: ScoredRollout) -> ScoredRollout:
        """Replaces groups of equal rewards, which have no gradient, by groups of unused prompts.

        Each of up to `max_resample_rounds` rounds uses one of the item's `extra_prompts` per such
        group.

        References:
          Yu et al., DAPO, 2025, https://arxiv.org/abs/2503.14476, eq. 11 (dynamic sampling)
        """
        kept, metrics = collected, collected.metrics | {"resampled_groups": 0}
        drawn = kept.rewards[~np.isnan(kept.rewards)]
        if drawn.size:
            metrics["reward_drawn"] = float(drawn.mean())
        extra_prompts = item.get("extra_prompts", {"prompt_ids": [], "rows": []})
        for attempt in range(self.max_resample_rounds):
            flat = np.flatnonzero(has_zero_std(kept.rewards))
            first = attempt * len(item["rows"])
            fresh_item = {
                name: values[first : first + len(flat)] for name, values in extra_prompts.items()
            }
            if not fresh_item["rows"]:
                break
            key = jax.random.fold_in(self._key(state, RESAMPLING), attempt)
            fresh = self.collect(state, fresh_item, key)
            kept, replaced = _replace(kept, fresh, flat)
            metrics["resampled_groups"] += replaced
            for name in ("time/rollout", "time/reward", "reward_errors"):
                metrics[name] += fresh.metrics[name]
        return kept._replace(metrics=metrics)

    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        rollout, rewards = collected.rollout, collected.rewards
        # A truncated completion keeps its reward in the group's mean either way. Without it the
        # baseline would be the mean of the completions that ended, which is biased upwards.
        mask = rollout.mask
        if self.mask_truncated_completions:
            mask = mask & ~rollout.truncated[:, :, None]
        old_logprobs = self.old_logprobs(state, rollout)
        arrays = {
            "mask": mask,
            "old_logprobs": old_logprobs,
            "sampling_logprobs": rollout.logprobs,
        }
        if self.beta:
            reference = reference_params(state.frozen)
            ref_logprobs = self.token_logprobs(reference, rollout)
            check_finite("the reference's log-probability", ref_logprobs, rollout, reference)
            if self.kl_in_reward:
                kl = kl_estimate(old_logprobs, ref_logprobs, rollout.mask, self.kl_estimator)
                rewards = rewards - self.beta * np.asarray(kl, np.float64).sum(axis=2)
            arrays["ref_logprobs"] = ref_logprobs
        advantages = np.array(self.advantages(rewards), np.float32)
        # A completion without any reward gets advantage 0. NaN of any other origin stays, so that
        # the update is skipped and counted.
        advantages[np.isnan(rewards)] = np.nan
        advantages[np.isnan(collected.rewards)] = 0.0
        return arrays | {"advantages": advantages}

    def make_batch(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of an update; groups that cannot change its gradient are not laid out."""
        laid = np.ones(len(arrays["advantages"]), bool)
        if self.skips_zero_advantages:
            laid = (arrays["advantages"] != 0).any(axis=1)  # NaN differs from 0
        return super().make_batch(arrays | {"laid": laid})

    @property
    def skips_zero_advantages(self) -> bool:
        """Whether completions of advantage 0 add exactly nothing to the gradient.

        Not so with a KL penalty, an entropy bonus, or the routers' loss, and unknown for a loss of
        the user's own.
        """
        return (
            self.loss_type in VANISHING
            and not self.beta
            and not self.entropy_coef
            and not getattr(self.model.config, "num_experts", 0)
            and type(self).compute_loss is GRPOTrainer.compute_loss
        )

    def experience_metrics(self, collected: ScoredRollout, experience: dict) -> dict:
        if not self.skips_zero_advantages:
            return {}
        return {"frac_groups_skipped": float((experience["advantages"] == 0).all(axis=1).mean())}

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        weights = self.model_params(params, frozen or {})
        (logprobs, entropy), aux_loss = self.completion_logprobs(weights, batch, rng)
        C = logprobs.shape[-1]
        logprobs, entropy = logprobs.reshape(-1, C), entropy.reshape(-1, C)  # [B, C]
        mask, old_logprobs, sampled = (
            batch[name].reshape(-1, C) for name in ("mask", "old_logprobs", "sampling_logprobs")
        )
        # What is not computed has a ratio of 1, and counts in the loss's denominator.
        laid = jnp.repeat(batch["laid"], len(mask) // len(batch["laid"]))[:, None]
        logprobs, computed = jnp.where(laid, logprobs, old_logprobs), mask & laid
        advantages = batch["advantages"].reshape(-1)
        # Not multiplied by a coefficient of 0: the entropy's gradient costs as much as the loss's.
        penalty, kl = (-self.entropy_coef * entropy if self.entropy_coef else None), None
        if self.beta:
            ref_logprobs = batch["ref_logprobs"].reshape(-1, C)
            kl = kl_estimate(logprobs, ref_logprobs, mask, self.kl_estimator)
        loss, weight, ratio = policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            clip=self.clip,
            penalty=penalty,
            kl=None if kl is None or self.kl_in_reward else self.beta * kl,
            unbiased_kl=self.use_bias_correction_kl,
            max_length=self.sampling.max_new_tokens,
        )
        metrics: dict = {"entropy": Mean(masked_mean(entropy, computed), computed.sum())}
        if kl is not None:
            metrics["kl"] = Mean(masked_mean(kl, mask), mask.sum())
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        metrics |= self._clip_metrics(ratio, advantages, mask)
        metrics |= difference_metrics(logprobs, sampled, computed)
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


def _replace(
    kept: ScoredRollout, fresh: ScoredRollout, flat: np.ndarray
) -> tuple[ScoredRollout, int]:
    """Replaces the groups `flat` by fresh groups of unequal rewards; also returns their number."""
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
