"""Supervised fine-tuning.

1. A batch holds tokens and labels: the token itself if it is trained, -100 otherwise.
2. The model computes the hidden state of every token, which attends to its own document only.
3. The label of token t + 1 is the target of token t.
4. Cross-entropy over the trained tokens, computed from chunks of hidden states.

    L = − Σ_m log p(target_m | tokens ≤ m) / #trained tokens

The mean is over all trained tokens of an update, however they are split into micro-batches and
rows. A mixture of experts adds its routers' load-balancing loss.

Axes: B batch, T tokens, D model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from relax import parallel
from relax.data.forest import pack_rows
from relax.losses import (
    IGNORED,
    SFT_LOSSES,
    GroupSums,
    linear_cross_entropy,
    next_token_targets,
    target_hits,
)
from relax.models.forward import hidden_states
from relax.models.trainable import merge
from relax.trainers.sources import source_metrics
from relax.trainers.state import initial_state
from relax.trainers.trainer import Trainer, TrainState
from relax.trainers.update import LossOutput, Mean, Sum


class SFTTrainer(Trainer):
    """Trainer for a `relax.models.Transformer` on labelled tokens.

    A batch is a dict of `[B, T]` integer arrays: `input_ids`, `labels`, and optionally `positions`
    and `segment_ids` (see `Transformer.hidden_states`). With `segment_ids`, the documents of padded
    rows are moved into fewer rows before the update: its cost follows the real tokens.

    Args:
      model, optimizer: as for `Trainer`. If the model has `lora`, only its adapters are trained.
      freeze: regular expression of weights that are not trained, see `relax.models.trainable`.
      loss_type: a name in `SFT_LOSSES`, or `path/to/file.py:function`.
      label_smoothing_factor, z_loss_coef: `label_smoothing` and `z_loss` of `linear_cross_entropy`.
      neftune_noise_alpha: α of `relax.models.forward.neftune_noise`, in training only; None: none.
      loss_chunk_size: tokens whose logits are in memory at once (>= 1).
      pad_to_multiple_of: the length of rows is a multiple of it (>= 1), if it is one already.
      exact_matches: compute `exact_match` in evaluation, at the cost of a second pass over the
        vocabulary.
      sources: names of the sources whose losses are metrics, by the batch's `source_ids`.
      **options: other arguments of `Trainer`, such as `params`.

    Metrics over trained tokens: `loss` and, with a loss other than cross-entropy, `nll` (nats),
    `mean_token_accuracy` (share of argmax hits) and `entropy` (of the predictions, nats).
    `num_tokens` counts all tokens except padding; `aux_loss` is the routers' load-balancing loss.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        freeze: str | None = None,
        loss_type: str = "nll",
        label_smoothing_factor: float = 0.0,
        z_loss_coef: float = 0.0,
        neftune_noise_alpha: float | None = None,
        loss_chunk_size: int = 256,
        pad_to_multiple_of: int = 1,
        exact_matches: bool = False,
        sources: Sequence[str] = (),
        **options,
    ):
        super().__init__(model, optimizer, **options)
        self._compiled_hits = jax.jit(self._document_hits)
        self.exact_matches, self.sources = exact_matches, tuple(sources)
        self.freeze = freeze
        SFT_LOSSES[loss_type]  # fails on an unknown name here, not in the first update
        if label_smoothing_factor and loss_type != "nll":
            raise ValueError(
                "label_smoothing_factor smooths the targets of loss_type nll, got loss_type "
                f"{loss_type!r}. Leave it at 0."
            )
        self.objective: dict[str, Any] = {
            "loss_type": loss_type,
            "label_smoothing": label_smoothing_factor,
            "z_loss": z_loss_coef,
        }
        self.neftune_noise_alpha = neftune_noise_alpha
        self.loss_chunk_size, self.pad_to_multiple_of = loss_chunk_size, pad_to_multiple_of

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        return initial_state(self.model, self.optimizer, key, params, self.freeze)

    def pack(self, item, blocks: int | None = None) -> dict:
        """The batch with its documents in fewer rows, see `pack_rows`."""
        blocks = blocks or self.num_blocks
        return pack_rows(item, blocks, self.pad_to_multiple_of)

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        weights = merge(params, frozen or {})
        segment_ids = batch.get("segment_ids")
        groups = batch.get("source_ids") if self.sources else None
        hidden, aux_loss = hidden_states(
            self.model, weights, batch, rng=rng, neftune_noise_alpha=self.neftune_noise_alpha
        )
        sums = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),  # [B, T, D] -> [M, D]
            self.model.output_matrix(weights),
            next_token_targets(batch["labels"]).reshape(-1),
            **self.objective,
            **self._vocabulary(),
            groups=None if groups is None else groups.reshape(-1),
            num_groups=len(self.sources),
        )
        tokens = batch["input_ids"].size if segment_ids is None else (segment_ids > 0).sum()
        trained = jnp.maximum(sums.weight, 1)
        loss = sums.loss / trained
        metrics = {
            "mean_token_accuracy": sums.correct / trained,
            "entropy": sums.entropy / trained,
            "num_tokens": Sum(jnp.asarray(tokens, jnp.int32)),
        }
        if isinstance(sums, GroupSums):
            metrics |= source_metrics(self.sources, sums.group_loss, sums.group_weight)
        if tuple(self.objective.values()) != ("nll", 0, 0):
            metrics["nll"] = sums.nll / trained
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        return LossOutput(loss=loss, weight=sums.weight, metrics=metrics)

    def evaluate_batch(self, params, frozen, batch) -> LossOutput:
        output = super().evaluate_batch(params, frozen, batch)
        if not self.exact_matches:
            return output
        exact, counted = self._document_hits(params, frozen, batch)
        share = Mean(exact / jnp.maximum(counted, 1), counted)
        return dataclasses.replace(output, metrics=output.metrics | {"exact_match": share})

    def exact_match(self, state: TrainState, loader) -> float:
        """Share of documents whose trained tokens greedy decoding reproduces exactly.

        That is the case when each of the tokens is the argmax after the tokens before it, so one
        forward pass is enough.

        Args:
          state: supplies `eval_params`.
          loader: an iterable of batches; documents without a target are not counted.
        """
        params, right, documents = state.eval_params, 0, 0
        for batch in loader:
            batch = parallel.shard_batch(batch)
            exact, counted = self._compiled_hits(params, state.frozen, batch)
            right, documents = right + int(exact), documents + int(counted)
        return right / max(documents, 1)

    def _document_hits(self, params, frozen, batch):
        weights = merge(params, frozen)
        targets = next_token_targets(batch["labels"])  # [B, T]
        hidden, _ = hidden_states(self.model, weights, batch)
        hits = target_hits(
            hidden.reshape(-1, hidden.shape[-1]),
            self.model.output_matrix(weights),
            targets.reshape(-1),
            **self._vocabulary(),
        ).reshape(targets.shape)
        B, T = targets.shape
        # In packed rows each segment is a document; a target belongs to the segment that predicts
        # it.
        segments = batch.get("segment_ids", jnp.zeros_like(targets))
        documents = jnp.arange(B)[:, None] * (T + 1) + segments

        def any_of(flags):
            found = jax.ops.segment_max(
                flags.astype(jnp.int32).reshape(-1), documents.reshape(-1), B * (T + 1)
            )
            return found > 0  # segment_max is negative for an empty segment

        trained = targets != IGNORED
        counted = any_of(trained)
        return (counted & ~any_of(trained & ~hits)).sum(), counted.sum()

    def _vocabulary(self):
        """Options that turn hidden states into logits."""
        cap = self.model.config.final_logit_softcapping
        return {"chunk_size": self.loss_chunk_size, "softcap": cap}
