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

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIOS,
    Clip,
    PolicyOptions,
    clip_fractions,
    gdpo_advantages,
    high_entropy,
    kl_estimate,
    masked_mean,
    near_policy,
    policy_loss,
)
from relax.trainers.rl.differences import difference_metrics
from relax.trainers.rl.entropy import EntropyControl
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.resampling import replace_groups
from relax.trainers.rl.rollout import has_zero_std
from relax.trainers.rl_trainer import (
    RESAMPLING,
    RLTrainer,
    ScoredRollout,
)
from relax.trainers.state import TrainState, reference_params, update_reference
from relax.trainers.update import LossOutput, Max, Mean, Min

LOSS_STREAM = np.uint32(2**31)  # of the update's key: tokens that a loss draws at random


class GRPOTrainer(RLTrainer):
    """Trainer for GRPO and, by its options, related algorithms, see docs/grpo.md.

    Args:
      model, optimizer, reward_funcs, tokenizer, **options: as for `RLTrainer`.
      beta: KL coefficient β (>= 0); 0 disables the reference model.
      kl_estimator: `k1`, `k2`, `k3`, or a registered one.
      kl_in_reward: subtract the penalty, summed over a completion's tokens, from its reward instead
        of adding it to the loss.
      use_bias_correction_kl: multiply the penalty per token by the ratio (TRL's name and default),
        which estimates the KL of the current policy from tokens sampled by an older one.
      epsilon, epsilon_high, delta: bounds of the ratio, see `Clip`; epsilon_high None: epsilon.
      loss_type: a name in `LOSS_TYPES`, or `path/to/file.py:function`.
      importance_sampling_level: `token`, `sequence` (GSPO) or `trajectory` (RLOO).
      scale_rewards: a name in `ADVANTAGES`, or `path/to/file.py:function`.
      multi_objective_aggregation: `sum_then_normalize`, or `normalize_then_sum`, which is
        `gdpo_advantages` in place of `scale_rewards`.
      mask_truncated_completions: do not train on truncated completions. Their rewards still count
        in their group's mean and standard deviation.
      off_policy_mask_threshold: exclude completions by `near_policy`; None: none.
      top_entropy_quantile: train on this fraction of the tokens, see `high_entropy`; 1: on all.
      entropy_coef: coefficient of the entropy bonus, which is subtracted from the loss.
      use_adaptive_entropy, entropy_target, entropy_coef_delta, entropy_coef_min, entropy_coef_max:
        adapt the coefficient, see `EntropyControl`.
      max_resample_rounds: maximum number of times that groups of equal rewards are replaced by
        groups of the item's `extra_prompts` (DAPO's dynamic sampling); 0: never.
      cast_lm_head_to_fp32: compute logits in float32 throughout, see `Transformer`.
      sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: see `update_reference`.
      sapo_temperature_pos, ...: other fields of `PolicyOptions`.
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
        multi_objective_aggregation: str = "sum_then_normalize",
        mask_truncated_completions: bool = False,
        off_policy_mask_threshold: float | None = None,
        top_entropy_quantile: float = 1.0,
        entropy_coef: float = 0.0,
        use_adaptive_entropy: bool = False,
        entropy_target: float = 0.2,
        entropy_coef_delta: float = 0.005,
        entropy_coef_min: float = 0.0,
        entropy_coef_max: float = 1.0,
        max_resample_rounds: int = 0,
        cast_lm_head_to_fp32: bool = False,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        **options,
    ):
        named = {name: options.pop(name) for name in PolicyOptions._fields if name in options}
        model = model.clone(cast_lm_head_to_fp32=True) if cast_lm_head_to_fp32 else model
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
        self.loss_options = PolicyOptions(Clip(epsilon, high, delta), **named)
        self.use_bias_correction_kl = use_bias_correction_kl
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.scale_rewards, self.top_entropy_quantile = scale_rewards, top_entropy_quantile
        self.sums_normalized = _sums_normalized(multi_objective_aggregation, kl_in_reward)
        self.off_policy_mask_threshold = off_policy_mask_threshold
        if loss_type == "gmpo" and top_entropy_quantile < 1:
            raise ValueError(
                "loss_type 'gmpo' has one ratio for all tokens of a completion: leave "
                f"top_entropy_quantile at 1, got {top_entropy_quantile}."
            )
        bounds = (entropy_target, entropy_coef_delta, entropy_coef_min, entropy_coef_max)
        self.entropy_control = EntropyControl(*bounds) if use_adaptive_entropy else None
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

    def create_train_state(self, key: jax.Array) -> TrainState:
        state, adapts = super().create_train_state(key), self.entropy_control
        control: dict = {} if adapts is None else {"control": adapts.start(self.entropy_coef)}
        return dataclasses.replace(state, **control)

    def update(self, state: TrainState, batch):
        """Makes an update, and adapts the entropy coefficient in `state.control`."""
        adapts, control = self.entropy_control, state.control
        if adapts is None:
            return super().update(state, batch)
        coef = adapts.applied(control)
        rows = jnp.broadcast_to(coef, batch["laid"].shape)
        state, metrics = super().update(state, batch | {"entropy_coef": rows})
        control = adapts.adapted(control, metrics["entropy"])
        return dataclasses.replace(state, control=control), metrics | {"entropy_coef": coef}

    def advantages(self, rewards: np.ndarray):
        """Each completion's reward relative to its group, `[P, G]` -> `[P, G]`.

        Args:
          rewards: float64 on the host; NaN if no reward function applies, which gives advantage 0.
        """
        return ADVANTAGES[self.scale_rewards](rewards)

    def collect_item(self, state: TrainState, item, lag: int = 0) -> ScoredRollout:
        collected = super().collect_item(state, item, lag)  # generate, score
        if self.max_resample_rounds:
            collected = self.resample(state, item, collected, lag)
        return collected

    def resample(
        self, state: TrainState, item, collected: ScoredRollout, lag: int = 0
    ) -> ScoredRollout:
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
            key = jax.random.fold_in(self._key(state, RESAMPLING, lag), attempt)
            fresh = self.collect(state, fresh_item, key)
            kept, replaced = replace_groups(kept, fresh, flat)
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
        arrays = {"mask": mask, "sampling_logprobs": rollout.logprobs}
        if not self.uses_own_logprobs:
            arrays["old_logprobs"] = self.old_logprobs(state, rollout)
        if self.beta:
            reference = reference_params(state.frozen)
            ref_logprobs = self.token_logprobs(reference, rollout)
            check_finite("the reference's log-probability", ref_logprobs, rollout, reference)
            if self.kl_in_reward:
                own = arrays["old_logprobs"]
                kl = kl_estimate(own, ref_logprobs, rollout.mask, self.kl_estimator)
                rewards = rewards - self.beta * np.asarray(kl, np.float64).sum(axis=2)
            arrays["ref_logprobs"] = ref_logprobs
        if self.sums_normalized:
            weights = np.append(self.rewards.weights, [1.0] if self.has_environment else [])
            found = gdpo_advantages(collected.by_function, weights)
        else:
            found = self.advantages(rewards)
        advantages = np.array(found, np.float32)
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
    def uses_own_logprobs(self) -> bool:
        """Whether an update's old log-probabilities are those of its own forward pass.

        So it is when the sampler's are of another distribution, and a rollout is one update.
        """
        return self.recomputes_old_logprobs and self.updates_per_item == 1 and not self.kl_in_reward

    @property
    def skips_zero_advantages(self) -> bool:
        """Whether completions of advantage 0 add exactly nothing to the gradient.

        Not so with a KL penalty, an entropy bonus, or the routers' loss, and unknown for a loss of
        the user's own.
        """
        return (
            LOSS_TYPES[self.loss_type].vanishes
            and not self.beta
            and not self.entropy_coef
            and self.entropy_control is None
            and self.top_entropy_quantile == 1
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
        mask, sampled = (batch[name].reshape(-1, C) for name in ("mask", "sampling_logprobs"))
        # What is not computed has a ratio of 1, and counts in the loss's denominator.
        laid = jnp.repeat(batch["laid"], len(mask) // len(batch["laid"]))[:, None]
        if self.uses_own_logprobs:
            old_logprobs = jnp.where(laid, jax.lax.stop_gradient(logprobs), sampled)
        else:
            old_logprobs = batch["old_logprobs"].reshape(-1, C)
        logprobs, computed = jnp.where(laid, logprobs, old_logprobs), mask & laid
        advantages = batch["advantages"].reshape(-1)
        keep, bonus = self._kept(logprobs, sampled, entropy, advantages, mask, computed)
        metrics: dict = {}
        if self.correction is not None:
            corrected = self.correction.apply(advantages, old_logprobs, sampled, computed)
            advantages, metrics = corrected
        # Not multiplied by a coefficient of 0: the entropy's gradient costs as much as the loss's.
        penalty, kl = None, None
        if self.entropy_coef or self.entropy_control is not None:
            penalty = -batch.get("entropy_coef", jnp.float32([self.entropy_coef]))[0] * bonus
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
            options=self.loss_options,
            penalty=penalty,
            kl=None if kl is None or self.kl_in_reward else self.beta * kl,
            unbiased_kl=self.use_bias_correction_kl,
            keep=keep,
            max_length=self.sampling.max_new_tokens,
            key=None if rng is None else jax.random.fold_in(rng, LOSS_STREAM),
        )
        metrics["entropy"] = Mean(masked_mean(entropy, computed), computed.sum())
        if kl is not None:
            metrics["kl"] = Mean(masked_mean(kl, mask), mask.sum())
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        if keep is not None:
            metrics["frac_tokens_kept"] = Mean(masked_mean(keep & mask, mask), mask.sum())
        metrics |= self._clip_metrics(ratio, advantages, mask)
        metrics |= difference_metrics(logprobs, sampled, computed)
        return LossOutput(loss=loss, weight=weight, metrics=metrics)

    def _kept(self, logprobs, sampled, entropy, advantages, mask, computed):
        """Tokens to train on (None: all), and the entropies that the bonus is computed from."""
        keep = None
        if self.off_policy_mask_threshold is not None:
            delta = self.off_policy_mask_threshold
            keep = near_policy(logprobs, sampled, advantages, mask, threshold=delta)
        if self.top_entropy_quantile == 1:
            return keep, entropy
        top = high_entropy(entropy, computed, fraction=self.top_entropy_quantile)
        return (top if keep is None else top & keep), jnp.where(top, entropy, 0.0)

    def update_frozen(self, frozen, params, step):
        if not self.sync_ref_model or "ref" not in frozen:
            return frozen
        every = self.ref_model_sync_steps
        return update_reference(frozen, params, step, alpha=self.ref_model_mixup_alpha, every=every)

    def _clip_metrics(self, ratio, advantages, mask) -> dict:
        clip, interval = self.loss_options.clip, LOSS_TYPES[self.loss_type].interval
        if interval is None:
            return {}
        tokens = mask.sum()
        clipped = clip_fractions(ratio, advantages, mask, clip, interval)
        shares = {name: masked_mean(where, mask, axis=1) for name, where in clipped.items()}
        region = clipped["low"] | clipped["high"]
        return {
            "clip_ratio/low_mean": Mean(masked_mean(clipped["low"], mask), tokens),
            "clip_ratio/low_min": Min(shares["low"].min()),
            "clip_ratio/high_mean": Mean(masked_mean(clipped["high"], mask), tokens),
            "clip_ratio/high_max": Max(shares["high"].max()),
            "clip_ratio/region_mean": Mean(masked_mean(region, mask), tokens),
        }


def _sums_normalized(aggregation: str, kl_in_reward: bool) -> bool:
    """Whether rewards are normalised before they are summed.

    Raises:
      ValueError: the aggregation is unknown, or excludes a penalty in the reward.
    """
    known = ("sum_then_normalize", "normalize_then_sum")
    if aggregation not in known or (aggregation == known[1] and kl_in_reward):
        raise ValueError(
            f"multi_objective_aggregation must be {' or '.join(known)}, the latter without "
            f"kl_in_reward, got {aggregation!r} and kl_in_reward {kl_in_reward}."
        )
    return aggregation == known[1]
