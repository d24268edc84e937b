"""Online DPO: the policy's own completions, the best of a group against the worst.

1. `generate`: every prompt gets a group of G completions (`RLTrainer`).
2. `score`: reward functions, or a reward model, score them (`RLTrainer`).
3. `experience`: of each group the completion of the highest and that of the lowest reward.
4. `compute_loss`: a loss of `relax.losses.PREFERENCE_LOSSES` on these pairs.

    s = log π_θ(y | x) - log π_ref(y | x)
    L = - log σ(β (s_best - s_worst))

Groups of equal rewards have no pair: they are neither computed nor counted. Guo et al., Direct
Language Model Alignment from Online AI Feedback, 2024, https://arxiv.org/abs/2402.04792, algorithm
1; there G is 2, as in TRL. Log-probabilities are those at the sampling temperature.

Axes: P prompts, G completions of a group, N pairs, C tokens of a completion.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses import (
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    masked_mean,
    masked_sum,
)
from relax.trainers.rl.differences import difference_metrics
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.rollout import PER_TOKEN, Rollout, ScoredRollout, has_zero_std
from relax.trainers.rl_trainer import RLTrainer
from relax.trainers.state import TrainState, reference_params, update_reference
from relax.trainers.update import LossOutput, Mean


class OnlineDPOTrainer(RLTrainer):
    """Trainer for preferences between the policy's own completions.

    Args:
      model, optimizer, reward_funcs, tokenizer, **options: as for `RLTrainer`.
      loss_type: a name in `PREFERENCE_LOSSES`, or `path/to/file.py:function`.
      beta, label_smoothing: see `LossOptions`.
      sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: see `update_reference`.

    Metrics, with TRL's names: `rewards/chosen` and `rewards/rejected` are β s of the best and the
    worst completion, `rewards/margins` their difference, `rewards/accuracies` the share of pairs in
    which it is above 0; `logps/...` are log π of whole completions.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        loss_type: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        **options,
    ):
        self.loss = PREFERENCE_LOSSES[loss_type]
        super().__init__(model, optimizer, reference=self.loss.needs_reference, **options)
        if self.num_generations < 2:
            raise ValueError(
                "num_generations must be at least 2, since the best completion is compared with "
                f"the worst, got {self.num_generations}."
            )
        if sync_ref_model and (not self.reference or model.lora is not None):
            raise ValueError(
                "sync_ref_model needs a reference with its own weights: a loss that reads one, and "
                f"no adapters, got loss_type {loss_type!r} and lora {model.lora}."
            )
        self.options = LossOptions(beta, label_smoothing)
        self.sync_ref_model = sync_ref_model
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.ref_model_sync_steps = ref_model_sync_steps
        self.row_size = 2  # both completions of a pair, whatever G

    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, Any]:
        pairs = best_and_worst(collected)
        counts = np.repeat(~has_zero_std(collected.rewards)[:, None], 2, axis=1)
        arrays = {"mask": pairs.mask, "counts": counts, "sampling_logprobs": pairs.logprobs}
        if self.reference:
            reference = reference_params(state.frozen)
            found = self.token_logprobs(reference, pairs)
            check_finite("the reference's log-probability", found, pairs, reference)
            arrays["ref_logprobs"] = found
        return arrays | {"pairs": pairs}

    def _split(self, rollout: Rollout, experience: dict, key: jax.Array) -> Iterator[dict]:
        arrays = {name: value for name, value in experience.items() if name != "pairs"}
        return super()._split(experience["pairs"], arrays, key)

    def make_batch(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of an update; groups of equal rewards are not laid out."""
        return super().make_batch(arrays | {"laid": np.all(arrays["counts"], axis=1)})

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        weights = self.model_params(params, frozen or {})
        (logprobs, entropy), aux_loss = self.completion_logprobs(weights, batch, rng)
        mask, counts = batch["mask"] & batch["laid"][:, None, None], batch["laid"]  # [N, 2, C]
        sums, zeros = masked_sum(logprobs, mask, axis=2), jnp.zeros(mask.shape[:2])
        refs = masked_sum(batch["ref_logprobs"], mask, axis=2) if self.reference else zeros
        lengths = jnp.maximum(mask.sum(axis=2), 1)
        mean_length = jnp.broadcast_to(masked_mean(lengths[:, 0], counts), counts.shape)
        columns = [x[:, i] for x in (sums, refs, lengths) for i in (0, 1)]
        pairs = Pairs._make([*columns, mean_length, counts])
        losses = self.loss(pairs, self.options)
        loss = masked_mean(losses, counts)
        rewards = self.options.beta * (sums - refs)
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "rewards/chosen": masked_mean(rewards[:, 0], counts),
            "rewards/rejected": masked_mean(rewards[:, 1], counts),
            "rewards/margins": masked_mean(margins, counts),
            "rewards/accuracies": masked_mean(margins > 0, counts),
            "logps/chosen": masked_mean(sums[:, 0], counts),
            "logps/rejected": masked_mean(sums[:, 1], counts),
            "entropy": Mean(masked_mean(entropy, mask), mask.sum()),
        }
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        tokens = (logprobs, batch["sampling_logprobs"], mask)
        metrics |= difference_metrics(*(x.reshape(-1, mask.shape[2]) for x in tokens))
        return LossOutput(loss=loss, weight=counts.sum(), metrics=metrics)

    def update_frozen(self, frozen, params, step):
        if not self.sync_ref_model:
            return frozen
        every = self.ref_model_sync_steps
        return update_reference(frozen, params, step, alpha=self.ref_model_mixup_alpha, every=every)


def best_and_worst(collected: ScoredRollout) -> Rollout:
    """The completion of the highest and that of the lowest reward of each group, in this order.

    Completions without a reward are neither, unless no other is there.
    """
    rewards, rollout = collected.rewards, collected.rollout
    best = np.where(np.isnan(rewards), -np.inf, rewards).argmax(axis=1)
    worst = np.where(np.isnan(rewards), np.inf, rewards).argmin(axis=1)
    chosen = np.stack([best, worst], axis=1)  # [P, 2]
    rows = np.arange(len(chosen))[:, None]
    names = (*PER_TOKEN, "completion_lengths", "finish", "environment_rewards")
    picked: dict[str, Any] = {name: getattr(rollout, name)[rows, chosen] for name in names}
    for name in ("texts", "messages", "episodes"):
        lists = getattr(rollout, name)
        picked[name] = [[lists[p][g] for g in pair] for p, pair in enumerate(chosen)]
    return dataclasses.replace(rollout, **picked)
