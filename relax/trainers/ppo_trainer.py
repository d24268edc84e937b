"""Proximal policy optimisation (PPO) with a critic.

1. `generate`: every prompt gets completions (`RLTrainer`).
2. `score`: reward functions score them (`RLTrainer`).
3. `experience`: a KL penalty per token plus the score are the rewards; generalised advantage
   estimation turns them and the critic's values into advantages and returns.
4. `compute_loss`, for every mini-batch of every epoch: the clipped losses of policy and values.

    ρ_t = π_θ(y_t) / π_old(y_t)
    L = - Σ_t min(ρ_t Â_t, clip(ρ_t, 1 - ε, 1 + ε) Â_t) / #tokens
        + vf_coef Σ_t ½ max((V_t - R_t)², (clip(V_t, V_old ± ε_v) - R_t)²) / #states
        - entropy_coef H

Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347,
eq. 7 and 9; Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019,
https://arxiv.org/abs/1909.08593, section 2.2 (the penalty in the reward).

The trained parameters are `{"policy": ..., "value": ...}`. The critic is a head on the policy's
trunk, or a separate model with a head; V_t is the value of the state in which token t is sampled.

Difference from TRL: the log-ratio is clamped to ±20 before it is exponentiated, as in verl and
OpenRLHF.

Axes: P prompts, G completions of a group, g of them in a row, C tokens of a completion;
B completions of a batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses import (
    Clip,
    PolicyOptions,
    TokenLogprobs,
    clip_fractions,
    kl_estimate,
    log_ratios,
    masked_mean,
    masked_sum,
    policy_loss,
    value_losses,
)
from relax.models.forward import at_places, predicting_states
from relax.models.heads import HEAD, init_head, scores, trunk, with_head
from relax.models.lora import merge_adapters
from relax.models.trainable import merge
from relax.optimizers import freeze_for, learning_rate, partition_by_key
from relax.trainers.groups import pack_groups
from relax.trainers.rl.differences import difference_metrics
from relax.trainers.rl.experience import (
    AFTER_EOS,
    REWARD_AT,
    Experience,
    adapt_kl_coef,
    advantages_and_returns,
    as_experience,
    experience_metrics,
    mean_per_completion,
)
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.rollout import Rollout, with_slot_after_eos
from relax.trainers.rl_trainer import RLTrainer, ScoredRollout
from relax.trainers.state import TrainState, copy_tree, initial_weights, reference_params
from relax.trainers.update import (
    LossOutput,
    Mean,
    as_loss_output,
    reduce_metrics,
    split_micro_batches,
)

COPY = "policy"  # a critic initialised as a copy of the policy


class PPOTrainer(RLTrainer):
    """Trainer for a policy and a critic, on rewards of the policy's completions.

    Args:
      model, optimizer, reward_funcs, tokenizer, **options: as for `RLTrainer`; `optimizer` is the
        policy's.
      value_model: the critic. None: a head on the policy's trunk; "policy": a copy of the policy's
        trunk with a head; or a `Transformer`, whose trunk gets a head.
      value_params: parameters of a separate critic (copied), with or without a head; None: random
        initialisation.
      critic_optimizer: None: the policy's transformation, with a separate state.
      critic_warmup_steps: updates in which only the critic is trained (>= 0).
      num_ppo_epochs: passes over the completions of an item, each reshuffled (>= 1).
      num_generations: completions per prompt (>= 1).
      kl_coef: KL coefficient (>= 0); 0 disables the reference model.
      kl_estimator: `k1` or `k3`.
      kl_target: KL per completion in nats that the coefficient is adapted to; None: constant.
      kl_horizon: completions over which the coefficient changes by at most 20 %.
      reward_at: `last_token` or `after_eos`, see `token_rewards`.
      missing_eos_penalty: subtracted from the score of a truncated completion.
      whiten_rewards: scale the rewards of a rollout to unit variance.
      gamma, lam: discount and λ of `gae`, in [0, 1].
      cliprange, dual_clip: bounds of the ratio: [1 - cliprange, 1 + cliprange], and dual_clip for
        negative advantages (Ye et al., 2020, https://arxiv.org/abs/1912.09729, eq. 5), or None.
      cliprange_value: distance from the rollout's value beyond which a value gets no gradient;
        None: no bound.
      vf_coef: coefficient of the value loss.
      entropy_coef: coefficient of the entropy bonus, which is subtracted from the loss.
      target_kl: mean KL per token in nats from the rollout's policy, above which an update and the
        remaining ones of its rollout are skipped; None: never.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        value_model=None,
        value_params=None,
        critic_optimizer=None,
        critic_warmup_steps: int = 0,
        num_ppo_epochs: int = 4,
        num_generations: int = 1,
        kl_coef: float = 0.05,
        kl_estimator: str = "k1",
        kl_target: float | None = None,
        kl_horizon: float = 10000,
        reward_at: str = "last_token",
        missing_eos_penalty: float | None = None,
        whiten_rewards: bool = False,
        gamma: float = 1.0,
        lam: float = 0.95,
        cliprange: float = 0.2,
        dual_clip: float | None = None,
        cliprange_value: float | None = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        target_kl: float | None = None,
        **options,
    ):
        critic_optimizer = critic_optimizer or optimizer
        parts = {"policy": freeze_for(optimizer, critic_warmup_steps), "value": critic_optimizer}
        super().__init__(
            model,
            partition_by_key(parts),
            num_generations=num_generations,
            num_iterations=num_ppo_epochs,
            reference=kl_coef != 0,
            **options,
        )
        for name, value, known in (
            ("kl_estimator", kl_estimator, ("k1", "k3")),
            ("reward_at", reward_at, REWARD_AT),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}. Known: {', '.join(known)}.")
        self.copies_policy = value_model == COPY
        if value_params is not None and (value_model is None or self.copies_policy):
            raise ValueError(
                "value_params need a value_model with its own weights, got "
                f"value_model={value_model!r}. Remove value_params, or pass their model."
            )
        own = trunk(model).clone(lora=None) if self.copies_policy else value_model
        self.value_model, self.value_params = own and trunk(own), value_params
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.reward_at, self.missing_eos_penalty = reward_at, missing_eos_penalty
        self.whiten_rewards, self.gamma, self.lam = whiten_rewards, gamma, lam
        self.clip = Clip(cliprange, cliprange, dual_clip)
        self.cliprange_value = cliprange_value
        self.vf_coef, self.entropy_coef, self.target_kl = vf_coef, entropy_coef, target_kl
        self._values = jax.jit(self.completion_values)

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        value_params = self.value_params if self.donate_params else copy_tree(self.value_params)
        policy, frozen = initial_weights(self.model, key, params, self.freeze, self.reference)
        value = self._initial_critic(key, merge(policy, frozen), value_params)
        state = TrainState.create(
            params={"policy": policy, "value": value},
            optimizer=self.optimizer,
            rng=key,
            frozen=frozen,
        )
        control = {}
        if self.kl_target is not None:
            control["kl_coef"] = jnp.float32(self.kl_coef)
        if self.target_kl is not None:
            control["stopped"] = jnp.zeros((), bool)
        return dataclasses.replace(state, control=control)

    def _initial_critic(self, key, policy, params) -> dict:
        model = self.value_model or self.model
        # The first values are 0: gradients from a random head would disturb the trunk.
        head = init_head(key, model.config, std=0.0, dtype=model.param_dtype)
        if self.value_model is None:
            return {HEAD: head}
        if self.copies_policy:
            lora = self.model.lora
            params = copy_tree(policy if lora is None else merge_adapters(policy, lora))
        elif params is None:
            key = jax.random.fold_in(key, 1)
            params, _ = initial_weights(self.value_model, key)
        return params if HEAD in params else with_head(params, head)

    def model_params(self, params, frozen) -> dict:
        return merge(params["policy"], frozen)

    def generate(self, state: TrainState, item, key: jax.Array, sampling=None) -> Rollout:
        rollout = super().generate(state, item, key, sampling)
        if self.reward_at == AFTER_EOS:
            most = (sampling or self.sampling).max_new_tokens
            rollout = with_slot_after_eos(rollout, most)
        return rollout

    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        rollout, score = collected.rollout, collected.rewards
        shape = rollout.completion_ids.shape
        if self.missing_eos_penalty is not None:
            score = score - self.missing_eos_penalty * rollout.truncated
        # A completion that no reward function applies to is masked, its KL penalty too: its score
        # of 0 below is a placeholder, not a reward. A truncated completion keeps its score:
        # masking it would remove any cost of writing too long.
        mask = rollout.mask & ~np.isnan(score)[:, :, None]
        old_logprobs = self.old_logprobs(state, rollout)
        values = self.per_token(
            rollout, lambda batch: self._values(state.params, state.frozen, batch)
        )
        weights = {"params": state.params, "frozen": state.frozen}
        check_finite("the critic's value", values, rollout, weights)
        kl = np.zeros(shape, np.float32)
        if self.kl_coef:
            reference = reference_params(state.frozen)
            ref_logprobs = self.token_logprobs(reference, rollout)
            check_finite("the reference's log-probability", ref_logprobs, rollout, reference)
            kl = np.asarray(kl_estimate(old_logprobs, ref_logprobs, mask, self.kl_estimator))
        kl_coef = np.float32(state.control.get("kl_coef", self.kl_coef))
        known_score = np.where(np.isnan(score), 0.0, score).astype(np.float32)
        rows = (known_score, kl, values, mask, rollout.completion_lengths)
        targets = advantages_and_returns(
            *(row.reshape(-1, *row.shape[2:]) for row in rows),
            kl_coef,
            reward_at=self.reward_at,
            whiten_rewards=self.whiten_rewards,
            gamma=self.gamma,
            lam=self.lam,
        )
        return {name: np.asarray(value).reshape(shape) for name, value in targets.items()} | {
            "mask": mask,
            "sampling_logprobs": rollout.logprobs,
            "old_logprobs": old_logprobs,
            "values": values,
            "kl": kl,
            "mean_kl": np.full(shape[:2], mean_per_completion(kl, score), np.float32),
            "kl_coef": np.broadcast_to(kl_coef, shape[:2]),
            "score": score,
        }

    def experience_metrics(self, collected: ScoredRollout, experience: dict) -> dict:
        return experience_metrics(experience) | {
            "val/num_eos_tokens": float((~collected.rollout.truncated).sum())
        }

    def pack(self, item: dict[str, np.ndarray], blocks: int | None = None) -> dict:
        slots = int(self.reward_at == AFTER_EOS)
        models = [model for model in (self.model, self.value_model) if model is not None]
        return pack_groups(item, models, blocks or self.num_blocks, slots=slots)

    def make_batch(self, arrays: dict[str, np.ndarray]) -> Experience:
        return as_experience(super().make_batch(arrays))

    def evaluate(
        self, params, frozen, tokens, rng: jax.Array | None = None
    ) -> tuple[TokenLogprobs, jax.Array, dict[str, tuple]]:
        """Log-probabilities, entropies and values `[N, g, C]` of completions, 0 behind them.

        Also returns the routers' losses by metric name, each with the model configuration that
        holds its coefficient.
        """
        weights, aux = self.model_params(params, frozen), {}
        hidden, loss = predicting_states(self.model, weights, tokens, rng=rng)
        if loss is not None:
            aux["aux_loss"] = (loss, self.model.config)
        logprobs = self.logprobs_of(weights, hidden, tokens)
        if self.value_model is not None:
            hidden, loss = predicting_states(self.value_model, params["value"], tokens)
            if loss is not None:
                aux["critic_aux_loss"] = (loss, self.value_model.config)
        values = at_places(scores(params["value"], hidden), tokens["places"])
        return logprobs, values, aux

    def completion_values(self, params, frozen, tokens) -> jax.Array:
        """The values of `evaluate`, without the policy's log-probabilities."""
        model, weights = self.value_model, params["value"]
        if model is None:
            model, weights = self.model, self.model_params(params, frozen)
        hidden, _ = predicting_states(model, weights, tokens)
        return at_places(scores(params["value"], hidden), tokens["places"])

    def compute_loss(self, params, batch: Experience, rng=None, frozen=None) -> LossOutput:
        (logprobs, entropy), values, aux = self.evaluate(params, frozen or {}, batch.tokens, rng)
        C = values.shape[-1]
        logprobs, entropy, values = (x.reshape(-1, C) for x in (logprobs, entropy, values))
        names = ("sampling_logprobs", "old_logprobs", "advantages", "mask")
        sampled, old_logprobs, advantages, mask = (getattr(batch, n).reshape(-1, C) for n in names)
        corrected, weights = advantages, dict[str, Mean]()
        if self.correction is not None:
            corrected, weights = self.correction.apply(advantages, old_logprobs, sampled, mask)
        arrays = (logprobs, old_logprobs, corrected, mask)
        policy, weight, ratio = policy_loss(*arrays, options=PolicyOptions(self.clip))
        value_mask = batch.value_mask.reshape(-1, C)
        old_values, returns = batch.values.reshape(-1, C), batch.returns.reshape(-1, C)
        value, value_clipped = value_losses(
            values, old_values, returns, value_mask, clip=self.cliprange_value
        )
        # Micro-batches are weighted by tokens, but values belong to states, of which `after_eos`
        # adds one per completion: `select_rows` computes the update's ratio of tokens to states.
        per_token = masked_sum(value, value_mask) / jnp.maximum(weight, 1)
        loss = policy + self.vf_coef * batch.value_share[0] * per_token
        mean_entropy = masked_mean(entropy, mask)
        if self.entropy_coef:  # the gradient of the entropy costs as much as that of the loss
            loss -= self.entropy_coef * mean_entropy
        for aux_loss, config in aux.values():
            loss += config.router_aux_loss_coef * aux_loss
        states = value_mask.sum()
        metrics: dict = (
            weights
            | {name: aux_loss for name, (aux_loss, _) in aux.items()}
            | {
                "loss/policy_avg": Mean(policy, weight),
                "loss/value_avg": Mean(masked_mean(value, value_mask), states),
                "val/clipfrac_avg": Mean(masked_mean(value_clipped, value_mask), states),
                "entropy": Mean(mean_entropy, weight),
            }
        )
        log_ratio = log_ratios(logprobs, old_logprobs, mask)
        metrics |= self._ratio_metrics(ratio, log_ratio, advantages, mask)
        metrics |= difference_metrics(logprobs, sampled, mask)
        return LossOutput(loss=loss, weight=weight, metrics=metrics)

    def _ratio_metrics(self, ratio, log_ratio, advantages, mask) -> dict:
        clipped = clip_fractions(ratio, advantages, mask, self.clip)
        per_token = {
            "policy/approxkl_avg": jnp.square(log_ratio) / 2,
            "policy/clipfrac_avg": clipped["low"] | clipped["high"],
            "val/ratio": ratio,
            "val/ratio_var": jnp.square(ratio - 1.0),
        }
        return {name: Mean(masked_mean(x, mask), mask.sum()) for name, x in per_token.items()}

    def update(self, state: TrainState, batch: Experience):
        """Makes an update, then adapts the KL coefficient and the early stop in `state.control`."""
        if self.target_kl is None:
            state, metrics = super().update(state, batch)
        else:
            state, metrics = self._update_or_skip(state, batch, self.target_kl)
        for name, part in (("learning_rate", "policy"), ("critic_learning_rate", "value")):
            if (rate := learning_rate(state.opt_state.parts[part])) is not None:
                metrics[name] = rate
        control = dict(state.control)
        ends = state.step % self.updates_per_item == 0
        if self.kl_target is not None:
            count = batch.mask.shape[0] * batch.mask.shape[1] * self._updates_per_pass
            before, kl, horizon = control["kl_coef"], batch.kl[0], self.kl_horizon
            after = adapt_kl_coef(before, kl, target=self.kl_target, horizon=horizon, count=count)
            control["kl_coef"] = jnp.where(ends, after, before)
        if "stopped" in control:
            control["stopped"] &= ~ends
        return dataclasses.replace(state, control=control), metrics

    def _update_or_skip(self, state: TrainState, batch: Experience, target_kl: float):
        """Makes one update; the first above `target_kl` is undone, later ones are skipped."""
        update = super().update

        def proceed(state):
            new, metrics = update(state, batch)
            metrics.pop("learning_rate", None)
            far = metrics["policy/approxkl_avg"] > target_kl
            kept = jax.tree.map(
                lambda new, old: jnp.where(far, old, new),
                (new.params, new.opt_state),
                (state.params, state.opt_state),
            )
            new = dataclasses.replace(
                new, params=kept[0], opt_state=kept[1], control=state.control | {"stopped": far}
            )
            return new, metrics

        def skip(state):
            """Computes the same metrics without a gradient."""
            parts = split_micro_batches(batch, self.gradient_accumulation_steps)
            outputs = jax.lax.map(
                lambda part: as_loss_output(
                    self.compute_loss(state.params, part, frozen=state.frozen)
                ),
                parts,
            )
            none = {"grad_norm": jnp.float32(0), "skipped_steps": jnp.int32(0)}
            return dataclasses.replace(state, step=state.step + 1), reduce_metrics(outputs) | none

        state, metrics = jax.lax.cond(state.control["stopped"], skip, proceed, state)
        metrics["skipped_minibatches"] = state.control["stopped"].astype(jnp.int32)
        return state, metrics
