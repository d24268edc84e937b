"""Distillation: a student learns the next-token distributions of a teacher.

1. `divide`: the share λ of an item's prompts is on-policy.
2. `generate`: the student writes completions of these (`RLTrainer`); the others have some already.
3. `make_batch`: prompts and completions become rows of real tokens.
4. `compute_loss`: teacher and student compute the same tokens, and their distributions p and q are
   compared at each token of the completions.

    L = Σ_t D_β(p(· | y_<t) ‖ q(· | y_<t)) / #tokens

`distill_mode="policy_gradient"` takes the KL of the sampled tokens alone as their reward, and
differentiates through the policy that drew them:

    r_t = log p(y_t) − log q(y_t),   R_t = r_t + γ R_{t+1},   L = − Σ_t R_t ∇ log q(y_t) / #tokens

Agarwal et al., On-Policy Distillation of Language Models (GKD), 2023,
https://arxiv.org/abs/2306.13649, algorithm 1; Gu et al., MiniLLM, 2023,
https://arxiv.org/abs/2306.08543, eq. 3 (γ = 1).

Differences from TRL's GKDTrainer: λ is the share of each update's rows, not the probability that
an update is on-policy; the temperature applies in the loss too, as in its DistillationTrainer.

Axes: P prompts, N groups of a batch, g completions of a group, C tokens of a completion, B rows,
T tokens of a row, D model, k most likely tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.data.forest import ROWS
from relax.losses import (
    TeacherStates,
    TopLogprobs,
    gae,
    linear_divergence,
    linear_logprobs,
    masked_mean,
    top_logprobs,
)
from relax.models.forward import at_places, predicting_states
from relax.models.transformer import Transformer
from relax.rewards import RewardRunner
from relax.trainers.distillation_arrays import (
    PRIVILEGED,
    STORED,
    concatenated,
    example_arrays,
    filled,
    with_privileged,
)
from relax.trainers.groups import completion_targets, lay_out, num_tokens, pack_groups
from relax.trainers.rl.metrics import completion_records, rollout_metrics
from relax.trainers.rl.rollout import Rollout, ScoredRollout
from relax.trainers.rl_trainer import EVALUATION, ORDER, ROLLOUT, RLTrainer
from relax.trainers.state import TrainState, copy_tree, fresh_params, reference_params
from relax.trainers.trainer import LoggedBatch, Trainer
from relax.trainers.update import LossOutput, Sum

MODES = ("divergence", "policy_gradient")


class Teacher(NamedTuple):
    """A teacher of a `DistillationTrainer`.

    Attributes:
      model: its vocabulary begins with the student's tokens, under the same ids.
      params: all its parameters; None: a checkpoint or random initialisation supplies them.
      weight: its share among several teachers, above 0.
    """

    model: Transformer
    params: Any
    weight: float = 1.0


class DistillationTrainer(RLTrainer):
    """Trainer of a student on the distributions of its teachers.

    An item of the loader is a dict of lists, one entry per prompt: `prompt_ids` and `rows` as for
    `RLTrainer`; `examples`, labelled tokens (`relax.data.Encoded`) of prompt and completion, for
    what is off-policy; and optionally `teacher_prompt_ids`, prompts that only the teacher sees, and
    `teacher_ids` `[C, k]` and `teacher_logprobs` `[C, k + 1]`, see `TopLogprobs`, of the tokens
    from an example's first label on.

    Args:
      model, optimizer, tokenizer: as for `RLTrainer`.
      teachers: none: the student before training, which is free with adapters.
      precomputed: items hold the teacher's log-probabilities, and the state holds no teacher.
      beta: β in [0, 1], see `linear_divergence`; 0 is the forward KL divergence, 1 the reverse one.
      lmbda: λ in [0, 1], the share of prompts whose completions the student writes.
      loss_top_k: compare the teacher's k most likely tokens and all others as one; 0: all tokens.
      distill_mode: `divergence` or `policy_gradient`.
      gamma: γ in [0, 1] of `policy_gradient`; 0 rewards a token for itself alone.
      reward_funcs: of the student's completions, for metrics alone; see `RLTrainer`.
      num_generations: completions per prompt (>= 1); more than 1 needs lmbda 1.
      **options: other arguments of `RLTrainer`.

    Metrics over the tokens of completions: `loss` (nats), `teacher_agreement` (share of tokens at
    which student and teacher have the same most likely token) and `entropy` (of the student).
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        teachers: Sequence[Teacher] = (),
        precomputed: bool = False,
        beta: float = 0.5,
        lmbda: float = 0.5,
        loss_top_k: int = 0,
        distill_mode: str = "divergence",
        gamma: float = 0.0,
        reward_funcs: Any = (),
        num_generations: int = 1,
        **options,
    ):
        if not isinstance(reward_funcs, RewardRunner):
            reward_funcs = RewardRunner(reward_funcs, options.pop("reward_weights", None))
        super().__init__(
            model,
            optimizer,
            reward_funcs=reward_funcs,
            num_generations=num_generations,
            reference=not teachers and not precomputed,
            **options,
        )
        _check(beta, lmbda, gamma, distill_mode, num_generations, precomputed, teachers)
        self.teachers, self.precomputed = tuple(teachers), precomputed
        self.beta, self.lmbda, self.loss_top_k = beta, lmbda, loss_top_k
        self.distill_mode, self.gamma = distill_mode, gamma
        self._compiled_top = jax.jit(self._top_logprobs, static_argnums=2)

    def create_train_state(self, key: jax.Array) -> TrainState:
        state = super().create_train_state(key)
        given = {}
        for i, (model, params, _) in enumerate(self.teachers):
            params = params if self.donate_params else copy_tree(params)
            given[f"teacher_{i}"] = fresh_params(model, key) if params is None else params
        state = dataclasses.replace(state, frozen=state.frozen | given)
        return parallel.shard(state)

    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        return {"mask": collected.rollout.mask}

    def score(self, rollout: Rollout, step: int = 0) -> ScoredRollout:
        if self.reward_names:
            return super().score(rollout, step)
        shape = rollout.completion_lengths.shape
        return ScoredRollout(rollout, np.full(shape, np.nan), np.zeros((*shape, 0)), {}, {})

    def make_batches(self, state: TrainState, item) -> Iterator[LoggedBatch]:
        """Lets the student write the on-policy completions, and yields the batch of one update."""
        written, given = self.divide(state, item)
        parts, metrics, records = [], {}, []
        if written["rows"]:
            with self.rewards.tally.undone_if_interrupted():
                collected = self.collect(state, written, self._key(state, ROLLOUT))
            arrays = self._arrays(collected.rollout, self.experience(state, collected))
            parts.append(with_privileged(arrays, written))
            metrics = self._metrics(collected)
            records = completion_records(collected, self.reward_names, None)
        if given["rows"]:
            parts.append(example_arrays(given))
        yield LoggedBatch(self.make_batch(concatenated(parts)), metrics, records)

    def divide(self, state: TrainState, item: dict) -> tuple[dict, dict]:
        """The on-policy part of an item, round(λ P) of its prompts, and the rest."""
        P = len(item["rows"])
        order = np.asarray(jax.random.permutation(self._key(state, ORDER), P))
        count = round(self.lmbda * P)
        parts = np.sort(order[:count]), np.sort(order[count:])
        written, given = ({n: [v[i] for i in part] for n, v in item.items()} for part in parts)
        return written, given

    def pack(self, item: dict[str, np.ndarray], blocks: int | None = None) -> dict:
        """Arrays with leading axis N, their packed rows, and the teacher's where they differ."""
        blocks = blocks or self.num_blocks
        models = [self.model, *(teacher.model for teacher in self.teachers)]
        own = {name: value for name, value in item.items() if name not in (*PRIVILEGED, *STORED)}
        packed = pack_groups(own, models, blocks)

        def laid_out(values, fill=0):
            return lay_out(values, packed["places"], packed["input_ids"].shape, blocks, fill)

        stored = {n: laid_out(item[n]) for n in STORED if n in item}
        packed |= stored | {"token_mask": laid_out(own["mask"]) & (packed["previous"] >= 0)}
        if PRIVILEGED[0] in item:
            theirs = {n.removeprefix("teacher_"): item[n] for n in PRIVILEGED}
            theirs = pack_groups(own | theirs, models, blocks)
            packed |= {f"teacher_{name}": theirs[name] for name in ROWS if name in theirs}
            packed["teacher_places"] = laid_out(theirs["places"], fill=-1)
        return packed

    def compute_loss(self, params, batch, rng=None, frozen=None) -> LossOutput:
        weights = self.model_params(params, frozen or {})
        hidden, aux_loss = predicting_states(self.model, weights, batch, rng=rng)
        loss_of = self._divergence if self.distill_mode == "divergence" else self._policy_gradient
        loss, weight, metrics = loss_of(weights, hidden, self._teacher(frozen, batch), batch)
        metrics["num_tokens"] = Sum(num_tokens(batch))
        if aux_loss is not None:
            loss += self.model.config.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss
        return LossOutput(loss=loss, weight=weight, metrics=metrics)

    def _divergence(self, weights, hidden, teacher, batch):
        sums = linear_divergence(
            hidden.reshape(-1, hidden.shape[-1]),
            self.model.output_matrix(weights),
            teacher,
            batch["token_mask"].reshape(-1),
            beta=self.beta,
            top_k=self.loss_top_k,
            temperature=self.sampling.temperature,
            softcap=self.model.config.final_logit_softcapping,
            chunk_size=self.loss_chunk_size,
        )
        tokens = jnp.maximum(sums.weight, 1)
        metrics: dict = {
            "teacher_agreement": sums.agreement / tokens,
            "entropy": sums.entropy / tokens,
        }
        return sums.divergence / tokens, sums.weight, metrics

    def _policy_gradient(self, weights, hidden, teacher, batch):
        logprobs, entropy = (
            x.reshape(-1, x.shape[-1]) for x in self.logprobs_of(weights, hidden, batch)
        )
        targets = completion_targets(batch).reshape(-1)
        parts = [
            linear_logprobs(
                one.hidden,
                one.matrix,
                targets,
                temperature=self.sampling.temperature,
                softcap=one.softcap,
                chunk_size=self.loss_chunk_size,
            ).logprobs
            + np.log(one.weight / sum(other.weight for other in teacher))
            for one in teacher
        ]
        expected = functools.reduce(jnp.logaddexp, parts).reshape(batch["input_ids"].shape)
        expected = at_places(expected, batch["places"]).reshape(logprobs.shape)
        mask = batch["mask"].reshape(logprobs.shape)
        kl = jnp.where(mask, logprobs - expected, 0)
        rewards = jax.lax.stop_gradient(-kl)
        returns, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma=self.gamma, lam=1.0)
        # Its value is the KL of the tokens, and its gradient that of the sampled policy.
        ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
        loss = masked_mean(jax.lax.stop_gradient(kl) + returns * (1 - ratio), mask)
        return loss, mask.sum(), {"entropy": masked_mean(entropy, mask)}

    def _teacher(self, frozen, batch) -> tuple[TeacherStates, ...] | TopLogprobs:
        """The teachers' states before every token of the rows, or their log-probabilities."""
        if self.precomputed:
            return TopLogprobs(*(batch[n].reshape(-1, batch[n].shape[-1]) for n in STORED))
        teachers = self.teachers or (Teacher(self.model, None),)
        rows, places = batch, batch.get("teacher_places")
        if places is not None:
            rows = {name: batch[f"teacher_{name}"] for name in ROWS if f"teacher_{name}" in batch}
        found = []
        for i, (model, _, weight) in enumerate(teachers):
            params = frozen[f"teacher_{i}"] if self.teachers else reference_params(frozen)
            states, _ = predicting_states(model, params, rows)
            if places is not None:
                states = at_places(states, places)
            states, matrix = states.reshape(-1, states.shape[-1]), model.output_matrix(params)
            cap = model.config.final_logit_softcapping
            found.append(TeacherStates(states, matrix, weight, cap))
        return tuple(found)

    def teacher_logprobs(self, state: TrainState, item: dict, k: int) -> dict[str, list]:
        """The columns `teacher_ids` and `teacher_logprobs` of an item's examples."""
        arrays = filled(example_arrays(item), parallel.batch_shards())
        batch = parallel.shard_batch(self.pack(arrays, parallel.batch_shards()))
        found = map(parallel.to_host, self._compiled_top(state.frozen, batch, k))
        lengths = arrays["completion_lengths"][: len(item["examples"]), 0]
        return {
            name: [row[0, :n] for row, n in zip(values, lengths, strict=False)]
            for name, values in zip(STORED, found, strict=True)
        }

    def _top_logprobs(self, frozen, batch, k: int):
        teacher, rows = self._teacher(frozen, batch), batch["input_ids"].shape
        assert not isinstance(teacher, TopLogprobs)  # those are stored already
        temperature, size = self.sampling.temperature, self.loss_chunk_size
        found = top_logprobs(teacher, k, temperature=temperature, chunk_size=size)
        return tuple(at_places(x.reshape(*rows, -1), batch["places"]) for x in found)

    def evaluate_item(self, state: TrainState, params, item, index: int):
        """The loss on an item's examples, or else on the student's completions, and rewards.

        Rewards are those of the student's completions, if there are reward functions.
        """
        rewards = super().evaluate_item(state, params, item, index) if self.reward_names else None
        loss = None
        if "examples" in item:
            loss = self._evaluated_loss(state, params, example_arrays(item))
        elif rewards is None:
            key = jax.random.fold_in(jax.random.fold_in(state.rng, EVALUATION), index)
            at = dataclasses.replace(state, params=params)
            rollout = self.generate(at, item, key, self.eval_sampling)
            arrays = rollout.arrays(rollout.mask.shape[1], {"mask": rollout.mask})
            loss = self._evaluated_loss(state, params, with_privileged(arrays, item))
        return lambda: (loss, rewards and rewards())

    def _evaluated_loss(self, state: TrainState, params, arrays: dict[str, np.ndarray]):
        shards = parallel.batch_shards()
        batch = parallel.shard_batch(self.pack(filled(arrays, shards), shards))
        return jax.device_get(self.eval_step(params, state.frozen, batch))

    def reduce_evaluation(self, parts: list[tuple]) -> dict[str, float]:
        losses, rewards = (
            [x for x in column if x is not None] for column in zip(*parts, strict=True)
        )
        metrics = Trainer.reduce_evaluation(self, losses) if losses else {}
        return metrics | (super().reduce_evaluation(rewards) if rewards else {})

    def _metrics(self, collected: ScoredRollout) -> dict[str, float | int]:
        metrics = rollout_metrics(collected.rollout) | collected.metrics
        if self.reward_names:
            metrics |= super()._metrics(collected)
        del metrics["num_tokens"]  # the loss counts those of all rows
        return metrics


def _check(beta, lmbda, gamma, mode, num_generations, precomputed, teachers) -> None:
    if not all(0 <= x <= 1 for x in (beta, lmbda, gamma)) or mode not in MODES:
        raise ValueError(
            f"beta, lmbda and gamma must be in [0, 1], and distill_mode one of {', '.join(MODES)}, "
            f"got {beta}, {lmbda}, {gamma} and {mode!r}."
        )
    if lmbda < 1 and (num_generations > 1 or mode == "policy_gradient"):
        raise ValueError(
            "several completions per prompt and policy_gradient need lmbda 1, got "
            f"num_generations {num_generations}, distill_mode {mode} and lmbda {lmbda}."
        )
    if precomputed and (lmbda or teachers):
        raise ValueError(
            "precomputed log-probabilities are those of given completions and replace the "
            f"teachers, got lmbda {lmbda} and {len(teachers)} teachers: use 0 and none."
        )
    if any(teacher.weight <= 0 for teacher in teachers):
        weights = ", ".join(str(teacher.weight) for teacher in teachers)
        raise ValueError(f"weights of teachers must be above 0, got {weights}.")
