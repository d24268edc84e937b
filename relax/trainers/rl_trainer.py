"""Base trainer of reinforcement learning: from prompts to completions, rewards and experience.

One item of the loader, `{"prompt_ids": [...], "rows": [...]}`, becomes updates in three steps:

1. `generate`: the current policy samples a group of completions for every prompt.
2. `score`: reward functions score each completion.
3. `experience`: the algorithm turns rewards into the arrays of its loss, such as advantages and
   log-probabilities.

Sampling uses the trained weights themselves: no copy, no second engine. Every random number depends
only on (root key, update), so a run that is killed and resumed samples the same completions.

Axes: P prompts, G completions of a group, g of them in a row, L tokens of a prompt, C tokens of a
completion, D model, F reward functions.
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from relax import parallel
from relax.data.forest import deal
from relax.losses import TokenLogprobs, linear_logprobs
from relax.models.forward import at_places, predicting_states
from relax.parallel import processes
from relax.rewards import Environment, RewardRunner
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.trainers.groups import completion_targets, pack_groups, resized
from relax.trainers.rl.episodes import rollout_episodes
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.rollout import (
    Rollout,
    ScoredRollout,
    completion_records,
    is_truncated,
    make_rollout,
    reward_metrics,
    rollout_metrics,
    updates_per_pass,
    with_eos,
)
from relax.trainers.rl.scoring import RunLength, score_across_processes, submit_rewards
from relax.trainers.state import TrainState, initial_state
from relax.trainers.trainer import LoggedBatch, Trainer

# Random streams, folded into the root key before the update's number. `train_step` folds in that
# number alone, and no update has a number as large as these.
ROLLOUT, EVALUATION, ORDER, RESAMPLING = (np.uint32(2**31 + n) for n in range(4))


class RLTrainer(Trainer):
    """Base class of algorithms that learn from rewards of their own completions.

    A subclass supplies `experience` and `compute_loss`.

    Args:
      model, optimizer: as for `Trainer`; a `relax.models.Transformer`.
      reward_funcs: functions or names, see `relax.rewards`, or a `RewardRunner` with them.
      tokenizer: decodes completions; its EOS token ends them unless `sampling` names others.
      sampling: the sampling configuration; `n` is set to `num_generations`.
      freeze: as for `SFTTrainer`.
      environment: a function that makes one `relax.rewards.Environment` per completion, for
        completions of several turns; its reward is added to those of the functions. None: one turn.
      reward_weights: weights of the functions in their sum; None: 1 each.
      num_generations: G, completions per prompt (>= 1).
      prompts_per_item: prompts per loader item; None: any number, with one update per item.
      completions_per_update: a divisor of prompts_per_item * num_generations; None: all of them.
      num_iterations: passes over the completions of an item (>= 1).
      reference: keep the initial weights as the reference of a KL penalty. With adapters it is the
        model without them and needs no extra memory.
      recompute_old_logprobs: compute the old log-probabilities by a forward pass instead of using
        the sampler's. Always done if the sampler truncates or reshapes the distribution.
      eval_sampling: the sampling configuration in evaluation; None: as in training.
      pass_reward: the lowest reward that counts as passed in pass@k.
      loss_chunk_size: tokens whose logits are in memory at once (>= 1).
      **options: other arguments of `Trainer`.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        reward_funcs,
        tokenizer,
        sampling: SamplingConfig | None = None,
        freeze: str | None = None,
        environment: Callable[[], Environment] | None = None,
        reward_weights: Sequence[float] | None = None,
        num_generations: int = 8,
        prompts_per_item: int | None = None,
        completions_per_update: int | None = None,
        num_iterations: int = 1,
        reference: bool = False,
        recompute_old_logprobs: bool = False,
        eval_sampling: SamplingConfig | None = None,
        pass_reward: float = 1.0,
        loss_chunk_size: int = 256,
        **options,
    ):
        super().__init__(model, optimizer, **options)
        self._run_length = RunLength()
        self.callbacks = (*self.callbacks, self._run_length)
        given = isinstance(reward_funcs, RewardRunner)
        if not given and not reward_funcs and environment is None:
            raise ValueError(
                "reward_funcs is empty and there is no environment, so no completion gets a "
                "reward. Pass at least one function."
            )
        if given and reward_weights is not None:
            raise ValueError("a RewardRunner has its own weights: remove reward_weights.")
        self.rewards = reward_funcs if given else RewardRunner(reward_funcs, reward_weights)
        self.tokenizer, self.environment = tokenizer, environment
        self.reward_names = [*self.rewards.names, *(["environment"] if environment else [])]
        sampling = dataclasses.replace(sampling or SamplingConfig(), n=num_generations)
        self.sampling = with_eos(sampling, tokenizer)
        self.eval_sampling = with_eos(eval_sampling or sampling, tokenizer)
        self.freeze, self.reference = freeze, reference
        self.num_generations, self.num_iterations = num_generations, num_iterations
        self.recompute_old_logprobs = recompute_old_logprobs
        self.pass_reward, self.loss_chunk_size = pass_reward, loss_chunk_size
        self.prompts_per_item = prompts_per_item
        self._updates_per_pass, self.row_size = updates_per_pass(
            num_generations,
            prompts_per_item,
            completions_per_update,
            self.gradient_accumulation_steps,
        )
        self._compiled_logprobs = jax.jit(self._token_logprobs)

    @abc.abstractmethod
    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        """The arrays that `compute_loss` reads, with leading axes `[P, G]`."""

    @property
    def updates_per_item(self) -> int:
        return self.num_iterations * self._updates_per_pass

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        return initial_state(self.model, self.optimizer, key, params, self.freeze, self.reference)

    def make_batches(self, state: TrainState, item) -> Iterator[LoggedBatch]:
        """Samples and scores an item's completions, then yields the batches of its updates."""
        with self.rewards.tally.undone_if_interrupted():
            collected = self.collect(state, item, self._key(state, ROLLOUT))
            experience = self.timed_experience(state, collected)
        yield from self.split_updates(state, collected, *experience)

    def timed_experience(self, state: TrainState, collected: ScoredRollout) -> tuple[dict, float]:
        """The result of `experience`, and the seconds it took."""
        start_s = time.monotonic()
        return self.experience(state, collected), time.monotonic() - start_s

    def split_updates(
        self, state: TrainState, collected: ScoredRollout, experience: dict, seconds: float
    ) -> Iterator[LoggedBatch]:
        """Yields the batches of an item's updates; the first one carries the item's metrics."""
        metrics = self._metrics(collected) | self.experience_metrics(collected, experience)
        metrics["time/reference"] = seconds
        advantages = experience.get("advantages")
        records: Sequence[dict] = completion_records(collected, self.reward_names, advantages)
        for batch in self._split(collected.rollout, experience, self._key(state, ORDER)):
            yield LoggedBatch(batch, metrics, records)
            metrics, records = {}, ()

    def _evaluate(self, state: TrainState, loader, max_batches: int | None):
        with self.rewards.tally.undone_if_interrupted():
            return super()._evaluate(state, loader, max_batches)

    def experience_metrics(self, collected: ScoredRollout, experience: dict) -> dict:
        """Metrics of an item's experience; here none."""
        return {}

    def collect(self, state: TrainState, item, key: jax.Array) -> ScoredRollout:
        """Samples completions of an item's prompts and scores them: `generate`, then `score`."""
        start_s = time.monotonic()
        rollout = self.generate(state, item, key)
        rolled_s = time.monotonic()
        self._check(state, rollout)
        collected = self.score(rollout, int(state.step))
        times = {"time/rollout": rolled_s - start_s, "time/reward": time.monotonic() - rolled_s}
        return collected._replace(metrics=collected.metrics | times)

    def generate(
        self, state: TrainState, item, key: jax.Array, sampling: SamplingConfig | None = None
    ) -> Rollout:
        """Samples a group of completions for each prompt from the current policy."""
        sampling = sampling or self.sampling
        params = self.model_params(state.params, state.frozen)
        given = None
        if self.environment is None:
            prompts = item["prompt_ids"]
            decode = stop_decoder(self.tokenizer)
            out = generate(self.model, params, prompts, key, sampling, decode=decode)
        else:
            texts = (self._encode, self._decode, stop_decoder(self.tokenizer))
            item, out, given = rollout_episodes(
                self.model, params, item, key, sampling, self.environment, *texts
            )
        return make_rollout(item, out, sampling, self._decode, given)

    def score(self, rollout: Rollout, step: int = 0) -> ScoredRollout:
        """Scores every completion with the reward functions."""
        return score_across_processes(
            lambda part: self.submit_rewards(part, step)(),
            rollout,
            everywhere=self.rewards.in_process,
        )

    def submit_rewards(self, rollout: Rollout, step: int) -> Callable[[], ScoredRollout]:
        """Sends completions to the reward functions; returns a function that waits for rewards."""
        return submit_rewards(
            self.rewards,
            rollout,
            self._run_length.trainer_state(step),
            in_turns=self.environment is not None,
            decode=self.tokenizer.decode,
            eos_token_ids=self.sampling.eos_token_ids,
        )

    def completion_logprobs(
        self, params, batch, rng: jax.Array | None = None
    ) -> tuple[TokenLogprobs, jax.Array | None]:
        """Computes log-probabilities of a batch's completions at the sampler's temperature.

        Args:
          params: all parameters.
          batch: made by `make_batch`.
          rng: the key of the adapters' dropout; None: no dropout.

        Returns:
          Log-probabilities and entropies `[N, g, C]`, 0 where there is no token, and the routers'
          load-balancing loss or None.
        """
        hidden, aux_loss = predicting_states(self.model, params, batch, rng=rng)
        return self.logprobs_of(params, hidden, batch), aux_loss

    def logprobs_of(self, params, hidden: jax.Array, batch) -> TokenLogprobs:
        """The same from the hidden states `[B, T, D]` that predict the tokens of the rows."""
        out = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            self.model.output_matrix(params),
            completion_targets(batch).reshape(-1),
            temperature=self.sampling.temperature,
            softcap=self.model.config.final_logit_softcapping,
            chunk_size=self.loss_chunk_size,
        )
        rows = batch["input_ids"].shape
        return TokenLogprobs(*(at_places(x.reshape(rows), batch["places"]) for x in out))

    def old_logprobs(self, state: TrainState, rollout: Rollout) -> np.ndarray:
        """Log-probabilities `[P, G, C]` of completions under the policy that sampled them."""
        # The sampler's agree with the policy's to 1e-4 or better, unless it sampled from a
        # truncated distribution (top_k, top_p, ...): those are renormalised and would bias the
        # ratio.
        if self.recompute_old_logprobs or is_truncated(self.sampling):
            params = self.model_params(state.params, state.frozen)
            return self.token_logprobs(params, rollout)
        return rollout.logprobs

    def token_logprobs(self, params, rollout: Rollout) -> np.ndarray:
        """Log-probabilities `[P, G, C]` of completions under all parameters `params`."""
        return self.per_token(rollout, lambda batch: self._compiled_logprobs(params, batch))

    def per_token(self, rollout: Rollout, function: Callable) -> np.ndarray:
        """Applies a function of batches to a rollout and returns its values `[P, G, C]`.

        It gets as many rows at once as a micro-batch of an update, and so needs no more memory.
        """
        arrays = self._arrays(rollout)
        rows = len(arrays["prompt_ids"])
        size = max(1, rows // (self._updates_per_pass * self.gradient_accumulation_steps))
        parts, width = [], rollout.completion_ids.shape[2]
        for first in range(0, rows, size):
            part = {name: value[first : first + size] for name, value in arrays.items()}
            batch = self.pack(part, parallel.batch_shards())
            found = parallel.to_host(function(parallel.shard_batch(batch)))
            parts.append(resized(found, width))
        return np.concatenate(parts).reshape(rollout.completion_ids.shape)

    def _token_logprobs(self, params, batch):
        return self.completion_logprobs(params, batch)[0].logprobs

    def _arrays(self, rollout: Rollout, extra: dict | None = None) -> dict[str, np.ndarray]:
        """Arrays with a prompt and g of its completions per row, `[P * G / g, ...]`."""
        P, G = rollout.completion_lengths.shape
        return rollout.arrays(self._in_row(P, G) // self._rows_for_one(P, G), extra)

    def _in_row(self, P: int, G: int) -> int:
        """Completions per row on one device."""
        return self.row_size or math.gcd(P * G // self.gradient_accumulation_steps, G)

    def _rows_for_one(self, P: int, G: int) -> int:
        """Rows on a mesh for each row on one device, so that every device has whole rows."""
        parts = self._updates_per_pass * self.gradient_accumulation_steps * parallel.batch_shards()
        return self._in_row(P, G) // math.gcd(P * G // parts, self._in_row(P, G))

    def _split(self, rollout: Rollout, experience: dict, key: jax.Array) -> Iterator[dict]:
        """Yields the batches of all updates; if there are several, every pass is shuffled."""
        prompts = len(rollout.completion_lengths)
        if self.prompts_per_item not in (None, prompts):
            raise ValueError(
                f"an item must have {self.prompts_per_item} prompts (prompts_per_item), got "
                f"{prompts}. Drop the last, shorter item."
            )
        arrays = self._arrays(rollout, experience)
        rows = len(arrays["prompt_ids"])
        size = rows // self._updates_per_pass
        for iteration in range(self.num_iterations):
            order = np.arange(rows)
            if self.updates_per_item > 1:
                n = self._rows_for_one(*rollout.completion_lengths.shape)  # stay together
                fresh = jax.random.fold_in(key, iteration)
                order = np.asarray(jax.random.permutation(fresh, rows // n))
                order = (order[:, None] * n + np.arange(n)[None, :]).reshape(-1)
            for first in range(0, rows, size):
                chosen = order[first : first + size]
                yield self.make_batch({name: value[chosen] for name, value in arrays.items()})

    def make_batch(self, arrays: dict[str, np.ndarray]):
        """The batch of an update, from its arrays with leading axis N.

        Micro-batches and devices get about equal numbers of tokens.
        """
        blocks = self.gradient_accumulation_steps * parallel.batch_shards()
        sizes = arrays["prompt_lengths"] + arrays["completion_lengths"].sum(axis=1)
        sizes = sizes * arrays.get("laid", True)
        order = deal(sizes.tolist(), blocks)
        return self.pack({name: value[order] for name, value in arrays.items()}, blocks)

    def pack(self, arrays: dict[str, np.ndarray], blocks: int) -> dict[str, np.ndarray]:
        """The arrays with the rows of a packed forest, see `pack_groups`.

        Groups that `arrays["laid"]` excludes, `[N]` bool, are not computed.
        """
        return pack_groups(arrays, [self.model], blocks, laid=arrays.get("laid"))

    def _metrics(self, collected: ScoredRollout) -> dict[str, float | int]:
        rollout, rewards, by_function, _, metrics = collected
        statistics = reward_metrics(rewards, by_function, self.reward_names)
        return rollout_metrics(rollout) | statistics | metrics

    def _check(self, state: TrainState, rollout: Rollout) -> None:
        """Checks the sampler's log-probabilities, see `check_finite`."""
        weights = {"params": state.params, "frozen": state.frozen}
        check_finite("the sampler's log-probability", rollout.logprobs, rollout, weights)

    def evaluate_item(self, state: TrainState, params, item, index: int) -> Callable[[], tuple]:
        """Samples completions of held-out prompts with `eval_sampling` and scores them.

        They are scored while the next ones are sampled. Training cannot overlap the two, since the
        next rollout needs the update, which needs the rewards.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.rng, EVALUATION), index)
        step, state = int(state.step), dataclasses.replace(state, params=params)
        rollout = self.generate(state, item, key, self.eval_sampling)
        self._check(state, rollout)
        alone = processes.count() == 1
        collected = (
            self.submit_rewards(rollout, step) if alone else lambda: self.score(rollout, step)
        )

        def part() -> tuple:
            rollout, rewards, by_function, _, metrics = collected()
            return rewards, by_function, rollout.completion_lengths, metrics["reward_errors"]

        return part

    def reduce_evaluation(self, parts: list[tuple]) -> dict[str, float]:
        """The mean reward and pass@k."""
        columns = zip(*parts, strict=True)
        rewards, by_function = (np.concatenate(next(columns)) for _ in range(2))
        lengths, errors = columns
        # A completion without a reward counts as failed.
        passed = np.nan_to_num(rewards, nan=-math.inf) >= self.pass_reward
        return reward_metrics(rewards, by_function, self.reward_names) | {
            "pass@1": float(passed.mean()),
            f"pass@{passed.shape[1]}": float(passed.any(axis=1).mean()),
            "completions/mean_length": float(np.concatenate([x.ravel() for x in lengths]).mean()),
            "reward_errors": sum(errors),
        }

    def _key(self, state: TrainState, stream: int | np.integer) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(state.rng, stream), state.step)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
