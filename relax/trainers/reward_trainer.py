"""Reward models: score completions, learned from pairs of completions.

1. A batch holds prompts with a chosen and a rejected completion each.
2. The model reads prompt and completion; its head scores the last token.
3. The loss widens the difference of the two scores.

    r(x, y) = h(x, y)_last · w
    L = - log σ(r_chosen - r_rejected - margin) [+ c (r_chosen + r_rejected)²]

Ouyang et al., Training language models to follow instructions with human feedback, 2022,
https://arxiv.org/abs/2203.02155, eq. 1.

Differences from TRL: means are over all pairs of an update, however they are split into
micro-batches; the shared prompt of two completions is computed once; rows that are too long are
truncated or dropped as in DPO, and counted.

Axes: N pairs, B rows, T tokens of a row, D model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax.losses import bradley_terry_loss, centering_loss, masked_mean
from relax.models.forward import at_places, hidden_states
from relax.models.heads import HEAD, init_head, scores, trunk, with_head
from relax.models.trainable import merge
from relax.trainers.groups import num_tokens, pack_groups
from relax.trainers.sources import row_metrics
from relax.trainers.state import TrainState, fresh_params, initial_state
from relax.trainers.trainer import Trainer
from relax.trainers.update import LossOutput, Max, Min, Sum


class RewardTrainer(Trainer):
    """Trainer for a model that scores completions, on pairs of them.

    An item is a batch of `relax.data.PreferenceLoader`, which `pack` lays out.

    Args:
      model, optimizer: as for `Trainer`; a `relax.models.Transformer`, whose separate output
        matrix, if any, is removed.
      params: pretrained parameters, as for `Trainer`; a language model gets a new head unless it
        has one.
      freeze: as for `SFTTrainer`; the head is `score/kernel`. With adapters the head is trained
        too.
      center_rewards_coefficient: coefficient c of `centering_loss` (> 0); None: no centering.
      pad_to_multiple_of: the length of rows is a multiple of it (>= 1).
      sources: names of the sources whose losses are metrics, by the batch's `source_ids`.
      **options: other arguments of `Trainer`.

    Metrics, with TRL's names: `accuracy`, the share of pairs with r_chosen > r_rejected; `margin`,
    the mean difference; `min_reward`, `mean_reward` and `max_reward` over all completions;
    `num_tokens`, which counts a prompt once per completion.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        freeze: str | None = None,
        center_rewards_coefficient: float | None = None,
        pad_to_multiple_of: int = 1,
        sources: Sequence[str] = (),
        **options,
    ):
        super().__init__(trunk(model), optimizer, **options)
        if center_rewards_coefficient is not None and center_rewards_coefficient <= 0:
            raise ValueError(
                "center_rewards_coefficient must be above 0, or None for no centering, got "
                f"{center_rewards_coefficient}."
            )
        self.freeze, self.pad_to_multiple_of = freeze, pad_to_multiple_of
        self.sources = tuple(sources)
        self.center_rewards_coefficient = center_rewards_coefficient

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        if params is None:
            params = fresh_params(self.model, key)
        if HEAD not in params:
            params = with_head(
                params, init_head(key, self.model.config, dtype=self.model.param_dtype)
            )
        return initial_state(self.model, self.optimizer, key, params, self.freeze)

    def pack(self, item, blocks: int | None = None) -> dict[str, np.ndarray]:
        """The batch of an item's prompts and completions, see `pack_groups`."""
        blocks = blocks or self.num_blocks
        return pack_groups(item, [self.model], blocks, multiple=self.pad_to_multiple_of)

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        rewards, aux_loss = self._rewards(merge(params, frozen or {}), batch, rng)
        chosen, rejected = rewards.T
        mask = (batch["completion_lengths"] > 0).all(axis=1)
        losses = bradley_terry_loss(chosen, rejected, batch.get("margin"))
        if self.center_rewards_coefficient is not None:
            losses += self.center_rewards_coefficient * centering_loss(chosen, rejected)
        loss = masked_mean(losses, mask)
        metrics = row_metrics(self.sources, batch, losses, mask) | {
            "accuracy": masked_mean(chosen > rejected, mask),
            "margin": masked_mean(chosen - rejected, mask),
            "min_reward": Min(jnp.where(mask[:, None], rewards, jnp.inf).min()),
            "mean_reward": masked_mean(rewards.mean(axis=1), mask),
            "max_reward": Max(jnp.where(mask[:, None], rewards, -jnp.inf).max()),
            "num_tokens": Sum(num_tokens(batch)),
        }
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        return LossOutput(loss=loss, weight=mask.sum(), metrics=metrics)

    def _rewards(self, params, batch, rng) -> tuple[jax.Array, jax.Array | None]:
        """Scores `[N, 2]` of completions at their last token, and the routers' loss, if any."""
        hidden, aux_loss = hidden_states(self.model, params, batch, rng=rng)  # [B, T, D]
        return scores(params, at_places(hidden, batch["ends"])), aux_loss
