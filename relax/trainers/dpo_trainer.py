"""Direct preference optimisation and related losses.

1. A batch holds prompts with a chosen and a rejected completion each.
2. The policy and the frozen reference each compute every completion's log-probability.
3. The loss widens the margin between the two completions, measured against the reference.

    s = log π_θ(y | x) - log π_ref(y | x)
    L = - log σ(β (s_chosen - s_rejected))

Rafailov et al., Direct Preference Optimization, 2023, https://arxiv.org/abs/2305.18290, eq. 7.
`relax.losses.preference` and `relax.losses.dpo` have the losses. KTO takes single completions, good
or bad. The second completion of its pairs comes from another row: the mean s of these over the
micro-batch is the reference point.

Differences from TRL: `label_smoothing` works with sigmoid (cDPO); means are over all pairs of an
update, and the sft loss over all its chosen tokens, however they are split into micro-batches.

Axes: N pairs, C tokens of a completion, B rows, T tokens of a row, M = B * T tokens, D model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.losses import (
    IGNORED,
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    kto_loss,
    kto_reference_point,
    ld_weights,
    linear_collision,
    linear_logprobs,
    masked_mean,
    target_hits,
    wpo_weights,
)
from relax.losses.preference import check_divergence
from relax.models.forward import at_places, predicting_states
from relax.models.trainable import merge
from relax.trainers.groups import completion_targets, num_tokens, pack_groups, predicted_lengths
from relax.trainers.sources import row_metrics
from relax.trainers.state import (
    TrainState,
    copy_tree,
    initial_state,
    reference_params,
    update_reference,
)
from relax.trainers.trainer import Trainer
from relax.trainers.update import LossOutput, Mean, Sum

KTO = "kto"


class DPOTrainer(Trainer):
    """Trainer for pairs of completions, or with `loss_type="kto"` for single ones.

    An item is a batch of `relax.data.PreferenceLoader`, which `pack` lays out.

    Args:
      model, optimizer: as for `Trainer`; a `relax.models.Transformer`.
      params: as for `Trainer`; None: `ref_params`, or fresh ones.
      ref_params: parameters of the reference (copied); None: the initial ones. With adapters the
        reference is the model without them and needs no extra memory.
      freeze: as for `SFTTrainer`.
      loss_type: one or several names in `PREFERENCE_LOSSES`, or `path/to/file.py:function`, whose
        sum is minimised; or `kto`.
      loss_weights: weights of several losses; None: 1 each.
      beta, label_smoothing, ...: see `LossOptions`.
      ld_alpha: α of `ld_weights`, by which losses with a reference weight log-probabilities; None:
        1.
      use_weighting: multiply the loss of each pair by `wpo_weights`.
      desirable_weight, undesirable_weight: weights of good and bad completions in KTO.
      precomputed: batches contain `ref_logprobs`, and the state holds no reference.
      sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: see `update_reference`.
      loss_chunk_size: tokens whose logits are in memory at once (>= 1).
      pad_to_multiple_of: the length of rows is a multiple of it (>= 1).
      sources: names of the sources whose losses are metrics, by the batch's `source_ids`.
      **options: of `Trainer`.

    Metrics, with TRL's names: `rewards/...` are β s (for losses without a reference β log π / |y|);
    `rewards/accuracies` is the share of pairs with s_chosen > s_rejected; `logps/...` are log π of
    whole completions; `logits/...` are means over tokens and vocabulary (before a soft cap);
    `entropy` is the mean over tokens of all completions, `mean_token_accuracy` over tokens of
    chosen ones; `num_tokens` counts a prompt once per completion.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        ref_params=None,
        freeze: str | None = None,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        simpo_gamma: float = 0.5,
        discopop_tau: float = 0.05,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        precomputed: bool = False,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        loss_chunk_size: int = 256,
        pad_to_multiple_of: int = 1,
        sources: Sequence[str] = (),
        **options,
    ):
        super().__init__(model, optimizer, **options)
        self.sources = tuple(sources)
        names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        divergence = (f_divergence_type, f_alpha_divergence_coef)
        self.options = LossOptions(beta, label_smoothing, simpo_gamma, discopop_tau, *divergence)
        self.loss_weights = _checked(names, loss_weights, self.options, ld_alpha, use_weighting)
        self.loss_names, self.is_paired = names, names != (KTO,)
        self.ld_alpha, self.use_weighting = ld_alpha, use_weighting
        if ld_alpha is not None and precomputed:
            raise ValueError(
                "ld_alpha weights the reference's log-probabilities per token: it excludes "
                "precomputed, which has only their sums."
            )
        self.kto_weights = {
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        self.needs_reference = not self.is_paired or any(
            PREFERENCE_LOSSES[n].needs_reference for n in names
        )
        self.reference = self.needs_reference and not precomputed
        self.sync_ref_model = sync_ref_model
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.ref_model_sync_steps = ref_model_sync_steps
        has_base = model.lora is not None or freeze is not None
        if sync_ref_model and (not self.reference or has_base):
            raise ValueError(
                "sync_ref_model needs a reference with its own weights: use a loss that reads one, "
                "and no precomputed, adapters or freeze."
            )
        if ref_params is not None and (not self.reference or has_base):
            raise ValueError(
                "ref_params has no effect here: the reference is the frozen base, precomputed, or "
                "unused by the loss. Remove ref_params."
            )
        if self.params is None:  # the policy starts from the reference
            self.params = copy_tree(ref_params)
        self.ref_params, self.freeze = ref_params, freeze
        self.loss_chunk_size, self.pad_to_multiple_of = loss_chunk_size, pad_to_multiple_of
        self._compiled_logprobs = jax.jit(self._answer_logprobs)

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        copies = self.reference and self.ref_params is None
        state = initial_state(self.model, self.optimizer, key, params, self.freeze, copies)
        if self.ref_params is None:
            return state
        return state.replace(frozen={"ref": copy_tree(self.ref_params)})

    def update_frozen(self, frozen, params, step):
        if not self.sync_ref_model:
            return frozen
        every = self.ref_model_sync_steps
        return update_reference(frozen, params, step, alpha=self.ref_model_mixup_alpha, every=every)

    def pack(self, item, blocks: int | None = None) -> dict[str, np.ndarray]:
        """The batch of an item's prompts and completions, see `pack_groups`."""
        blocks = blocks or self.num_blocks
        packed = pack_groups(item, [self.model], blocks, multiple=self.pad_to_multiple_of)
        chosen = packed["places"][:, 0].reshape(blocks, -1)
        is_chosen = np.zeros((blocks, packed["input_ids"].size // blocks), bool)
        for block, places in zip(is_chosen, chosen, strict=True):
            block[places[places >= 0]] = True
        return packed | {"is_chosen": is_chosen.reshape(packed["input_ids"].shape)}

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        frozen = frozen or {}
        weights = merge(params, frozen)
        hidden, targets, aux_loss = self._states(weights, batch, rng)
        tokens = self._logprobs(weights, hidden, targets)
        plain = _per_completion(batch, tokens.logprobs)  # [N, 2]
        logprobs = plain
        if self.ld_alpha is not None:
            logprobs = _per_completion(batch, tokens.logprobs, self.ld_alpha)
        ref_logprobs = self._reference_logprobs(frozen, batch, logprobs)
        lengths = predicted_lengths(batch)
        mask = (lengths > 0).all(axis=1)
        if self.is_paired:
            losses, metrics = self._pair_losses(batch, plain, logprobs, ref_logprobs, lengths, mask)
        else:
            losses, metrics = self._kto_losses(batch, logprobs, ref_logprobs, lengths, mask)
        if self.use_weighting:
            losses *= self._wpo_weights(weights, batch, hidden, targets, tokens)
        loss = masked_mean(losses, mask)
        metrics |= row_metrics(self.sources, batch, losses, mask)
        scores = logprobs - ref_logprobs
        if not self.needs_reference:
            scores = logprobs / jnp.maximum(lengths, 1)
        metrics |= self._reward_metrics(batch, logprobs, scores, mask)
        metrics |= self._token_metrics(weights, batch, hidden, targets, tokens)
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        return LossOutput(loss=loss, weight=mask.sum(), metrics=metrics)

    def answer_logprobs(self, params, item) -> np.ndarray:
        """Log-probabilities `[N, 2]` of an item's completions under all parameters `params`."""
        batch = parallel.shard_batch(self.pack(item, parallel.batch_shards()))
        return parallel.to_host(self._compiled_logprobs(params, batch))

    def _reference_logprobs(self, frozen, batch, logprobs):
        if not self.needs_reference:
            return jnp.zeros_like(logprobs)
        given = batch.get("ref_logprobs")
        if given is None:
            given = self._answer_logprobs(reference_params(frozen), batch, self.ld_alpha)
        return jax.lax.stop_gradient(given)

    def _answer_logprobs(self, params, batch, alpha: float | None = None):
        hidden, targets, _ = self._states(params, batch, None)
        logprobs = self._logprobs(params, hidden, targets).logprobs
        return _per_completion(batch, logprobs, alpha)

    def _states(self, params, batch, rng):
        """Hidden states `[M, D]` before completion tokens, those tokens `[M]`, and the aux loss."""
        hidden, aux_loss = predicting_states(self.model, params, batch, rng=rng)
        targets = completion_targets(batch).reshape(-1)
        return hidden.reshape(-1, hidden.shape[-1]), targets, aux_loss

    def _logprobs(self, params, hidden, targets):
        matrix = self.model.output_matrix(params)
        return linear_logprobs(hidden, matrix, targets, **self._vocabulary())

    def _vocabulary(self):
        cap = self.model.config.final_logit_softcapping
        return {"chunk_size": self.loss_chunk_size, "softcap": cap}

    def _wpo_weights(self, params, batch, hidden, targets, tokens):
        matrix = self.model.output_matrix(params)
        collision = linear_collision(hidden, matrix, targets, **self._vocabulary())
        parts = (tokens.logprobs, collision, targets != IGNORED)
        rows = batch["input_ids"].shape
        return wpo_weights(*(at_places(x.reshape(rows), batch["places"]) for x in parts))

    def _pair_losses(self, batch, plain, logprobs, ref_logprobs, lengths, mask):
        lengths = jnp.maximum(lengths, 1)
        mean = batch.get("mean_chosen_length")
        if mean is None:
            mean = jnp.broadcast_to(masked_mean(lengths[:, 0], mask), mask.shape)
        pairs = Pairs(
            chosen=logprobs[:, 0],
            rejected=logprobs[:, 1],
            ref_chosen=ref_logprobs[:, 0],
            ref_rejected=ref_logprobs[:, 1],
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
            mean_chosen_length=mean,
            mask=mask,
        )
        # Losses without a reference, such as sft, are of the text itself.
        texts = pairs._replace(chosen=plain[:, 0], rejected=plain[:, 1])
        metrics, losses = {}, jnp.zeros_like(mean)
        for name, weight in zip(self.loss_names, self.loss_weights, strict=True):
            function = PREFERENCE_LOSSES[name]
            part = function(pairs if function.needs_reference else texts, self.options)
            losses += weight * part
            if len(self.loss_names) > 1:
                metrics[f"loss/{name}"] = masked_mean(part, mask)
        return losses, metrics

    def _kto_losses(self, batch, logprobs, ref_logprobs, lengths, mask):
        scores = logprobs - ref_logprobs
        kl = kto_reference_point(scores[:, 1], mask)
        is_desirable = batch["is_desirable"]
        beta = self.options.beta
        losses = kto_loss(scores[:, 0], kl, is_desirable, beta=beta, **self.kto_weights)
        return losses, {"kl": kl}

    def _reward_metrics(self, batch, logprobs, scores, mask) -> dict:
        rewards = self.options.beta * scores
        if self.is_paired:
            parts = {"chosen": (mask, 0), "rejected": (mask, 1)}
        else:
            good = batch["is_desirable"]
            parts = {"chosen": (mask & good, 0), "rejected": (mask & ~good, 0)}
        metrics: dict = {}
        for name, (rows, column) in parts.items():
            for what, values in (("rewards", rewards), ("logps", logprobs)):
                mean = masked_mean(values[:, column], rows)
                metrics[f"{what}/{name}"] = Mean(mean, rows.sum())
        if self.is_paired:
            margin = rewards[:, 0] - rewards[:, 1]
            metrics["rewards/margins"] = masked_mean(margin, mask)
            metrics["rewards/accuracies"] = masked_mean(rewards[:, 0] > rewards[:, 1], mask)
        return metrics

    def _token_metrics(self, params, batch, hidden, targets, tokens) -> dict:
        hidden, matrix = jax.lax.stop_gradient((hidden, self.model.output_matrix(params)))
        lengths = predicted_lengths(batch)
        # The mean over the vocabulary of hidden · matrixᵀ is hidden · (mean row of the matrix).
        logits = hidden.astype(jnp.float32) @ matrix.astype(jnp.float32).mean(axis=0)
        logits = _per_completion(batch, jnp.where(targets != IGNORED, logits, 0.0))
        entropy = _per_completion(batch, tokens.entropy)
        chosen = jnp.where(batch["is_chosen"].reshape(-1), targets, IGNORED)
        hits = target_hits(hidden, matrix, chosen, **self._vocabulary())
        hits = (hits & (chosen != IGNORED)).sum()
        if not self.is_paired:  # the second completion is another row's, used only for the KL
            good = batch["is_desirable"][:, None]
            entropy, logits, lengths = (
                jnp.concatenate([jnp.where(good, x, 0), jnp.where(good, 0, x)], axis=1)
                for x in (entropy[:, :1], logits[:, :1], lengths[:, :1])
            )
        counts = lengths.sum(axis=0)
        means = logits.sum(axis=0) / jnp.maximum(counts, 1)
        num_chosen = counts[0] if self.is_paired else counts.sum()
        return {
            "logits/chosen": Mean(means[0], counts[0]),
            "logits/rejected": Mean(means[1], counts[1]),
            "entropy": Mean(entropy.sum() / jnp.maximum(counts.sum(), 1), counts.sum()),
            "mean_token_accuracy": Mean(hits / jnp.maximum(num_chosen, 1), num_chosen),
            "num_tokens": Sum(num_tokens(batch)),
        }


def _checked(
    names, weights, options: LossOptions, ld_alpha: float | None, use_weighting: bool
) -> tuple[float, ...]:
    """Checks the losses and returns their weights.

    Raises:
      ValueError: an unknown loss, a wrong number of weights, options that exclude a loss, or a
        value out of range.
    """
    if not names or (KTO in names and len(names) > 1):
        raise ValueError(
            f"loss_type must name one or more losses, or kto alone, got {list(names)}."
        )
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"loss_weights must be one per loss_type, got {len(weights)} for {len(names)}."
        )
    beta, noise, kind = options.beta, options.label_smoothing, options.f_divergence_type
    if beta <= 0 or not 0 <= noise < 0.5 or ("exo_pair" in names and not noise):
        raise ValueError(
            "beta must be above 0 and label_smoothing in [0, 0.5), above 0 for exo_pair, got "
            f"{beta} and {noise}."
        )
    if names == (KTO,):
        if ld_alpha is not None or use_weighting or kind != "reverse_kl":
            raise ValueError(
                "kto has no ld_alpha, use_weighting or f_divergence_type, got "
                f"{ld_alpha}, {use_weighting} and {kind!r}."
            )
        return tuple(weights or (1.0,))
    for name in names:
        check_divergence(name, options)
        if use_weighting and PREFERENCE_LOSSES[name].compares_pairs:
            raise ValueError(
                f"use_weighting weights pairs, and loss_type {name!r} sorts the completions of all."
            )
    return tuple(weights or (1.0,) * len(names))


def _per_completion(batch, values: jax.Array, alpha: float | None = None) -> jax.Array:
    """Sums values over the tokens of each completion, `[M]` -> `[N, 2]`; `alpha`: `ld_weights`."""
    values = at_places(values.reshape(batch["input_ids"].shape), batch["places"])
    if alpha is not None:
        values *= ld_weights(batch["completion_lengths"], values.shape[2], alpha)
    return values.sum(axis=2)
