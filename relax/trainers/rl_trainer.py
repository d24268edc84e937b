"""Base trainer of reinforcement learning: from prompts to completions, rewards and experience.

One item of the loader, `{"prompt_ids": [...], "rows": [...]}`, becomes updates in three steps:

1. `generate`: the current policy samples a group of completions for every prompt.
2. `score`: reward functions score each completion.
3. `experience`: the algorithm turns rewards into the arrays of its loss, such as advantages and
   log-probabilities.

Sampling uses the trained weights themselves. Random numbers depend only on (root key, update), so a
run that is killed and resumed samples the same completions.

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
from jax.sharding import Mesh

from relax import parallel
from relax.data.forest import deal
from relax.losses import TokenLogprobs, linear_logprobs
from relax.models.forward import at_places, predicting_states
from relax.rewards import EpisodeRunner
from relax.sampling import SamplingConfig
from relax.trainers.groups import completion_targets, pack_groups, resized
from relax.trainers.rl import scoring
from relax.trainers.rl.ahead import Ahead, AheadLoader
from relax.trainers.rl.differences import Correction
from relax.trainers.rl.drafts import Drafts
from relax.trainers.rl.finite import check_finite
from relax.trainers.rl.generation import Agents, gives_rewards, make_maker, sample_rollout
from relax.trainers.rl.metrics import (
    completion_records,
    evaluation_metrics,
    reward_metrics,
    rollout_metrics,
)
from relax.trainers.rl.partners import Partner
from relax.trainers.rl.passes import passes, updates_per_pass
from relax.trainers.rl.rollout import Rollout, ScoredRollout, is_truncated, with_eos
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
      tools: functions that the model may call, see `relax.rewards.EpisodeRunner`, or a runner.
      environment_factory: makes an environment per completion, which answers the model's turns; its
        reward is added to those of the functions. None: none.
      max_tool_calling_iterations: turns of an episode that may call tools; None: any number.
      tool_format: format of tool calls, see `relax.data.tool_calls`; None: the chat template's.
      agents: make completions in place of the sampler, see `relax.serving.agents`; None: none.
      rollout_func: a function that makes completions, see `relax.trainers.rl.rollout_func`.
      reward_weights: weights of the functions in their sum; None: 1 each.
      num_generations: G, completions per prompt (>= 1).
      prompts_per_item: prompts per loader item; None: any number, with one update per item.
      completions_per_update: a divisor of prompts_per_item * num_generations; None: all of them.
      num_iterations: passes over the completions of an item (>= 1).
      reference: keep the initial weights as the reference of a KL penalty. With adapters it is the
        model without them and needs no extra memory.
      recompute_old_logprobs: compute the old log-probabilities by a forward pass instead of using
        the sampler's. Always done if the sampler has another distribution, dtype or policy.
      rollout_dtype: dtype of weights and cache in rollouts, such as "bfloat16"; None: the model's.
        Evaluation samples in the model's.
      correction: weights that correct updates for `rollout_dtype` or rollouts ahead; None: none.
      async_rollouts: items by which rollouts are drawn ahead, see `relax.trainers.rl.ahead`.
      rollout_mesh: devices of rollouts ahead; None: those of the updates.
      rollout_reuse: a prompt's last completions are drafts, see `relax.trainers.rl.drafts`.
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
        tools: Sequence[Callable | str] | EpisodeRunner | Partner = (),
        environment_factory: Callable | str | None = None,
        max_tool_calling_iterations: int | None = None,
        tool_format: str | None = None,
        agents: Agents | None = None,
        rollout_func: Callable | None = None,
        reward_weights: Sequence[float] | None = None,
        num_generations: int = 8,
        prompts_per_item: int | None = None,
        completions_per_update: int | None = None,
        num_iterations: int = 1,
        reference: bool = False,
        recompute_old_logprobs: bool = False,
        rollout_dtype: str | None = None,
        correction: Correction | None = Correction(),  # noqa: B008
        async_rollouts: int = 0,
        rollout_mesh: Mesh | None = None,
        rollout_reuse: bool = False,
        eval_sampling: SamplingConfig | None = None,
        pass_reward: float = 1.0,
        loss_chunk_size: int = 256,
        **options,
    ):
        super().__init__(model, optimizer, **options)
        sampling = dataclasses.replace(sampling or SamplingConfig(), n=num_generations)
        self.sampling = with_eos(sampling, tokenizer)
        self.eval_sampling = with_eos(eval_sampling or sampling, tokenizer)
        self.partner = make_maker(
            tokenizer,
            self.sampling.eos_token_ids,
            tools,
            environment_factory,
            agents=agents,
            rollout_func=rollout_func,
            async_rollouts=async_rollouts,
            tool_format=tool_format,
            max_tool_calling_iterations=max_tool_calling_iterations,
        )
        self.drafts = Drafts.make(self.partner, async_rollouts) if rollout_reuse else None
        self._run_length = scoring.RunLength()
        self.callbacks = (*self.callbacks, self._run_length, *filter(None, [self.drafts]))
        self.has_environment = gives_rewards(self.partner)
        required = not self.has_environment
        self.rewards = scoring.as_runner(reward_funcs, reward_weights, required=required)
        self.tokenizer = tokenizer
        self.reward_names = [*self.rewards.names, *["environment"] * self.has_environment]
        self.freeze, self.reference = freeze, reference
        self.num_generations, self.num_iterations = num_generations, num_iterations
        own = rollout_dtype is not None and np.dtype(rollout_dtype) != model.dtype
        self.rollout_model = model.clone(dtype=np.dtype(rollout_dtype)) if own else model
        apart = own or async_rollouts > 0  # the sampler from the policy
        self.correction = correction if apart else None
        self.recomputes_old_logprobs = recompute_old_logprobs or apart or is_truncated(sampling)
        self.pass_reward, self.loss_chunk_size = pass_reward, loss_chunk_size
        self.prompts_per_item = prompts_per_item
        sizes = num_generations, prompts_per_item, completions_per_update
        divided = updates_per_pass(*sizes, self.gradient_accumulation_steps)
        self._updates_per_pass, self.row_size = divided
        self._compiled_logprobs = jax.jit(self._token_logprobs)
        self.ahead = None
        if async_rollouts:
            updates = self.updates_per_item
            self.ahead = Ahead(self.collect_item, async_rollouts, updates, rollout_mesh)
            # First, so that all counts of the rollouts are in the state of the others.
            self.callbacks = (self.ahead, *self.callbacks)

    @abc.abstractmethod
    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        """The arrays that `compute_loss` reads, with leading axes `[P, G]`."""

    @property
    def updates_per_item(self) -> int:
        return self.num_iterations * self._updates_per_pass

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        return initial_state(self.model, self.optimizer, key, params, self.freeze, self.reference)

    def train(self, train_loader, *args, **options) -> TrainState:
        loader = AheadLoader(train_loader, self.ahead.count) if self.ahead else train_loader
        return super().train(loader, *args, **options)

    def make_batches(self, state: TrainState, item) -> Iterator[LoggedBatch]:
        """Samples and scores an item's completions, then yields the batches of its updates."""
        if self.ahead is None:
            with self.rewards.tally.undone_if_interrupted():
                collected = self.collect_item(state, item)
                experience = self.timed_experience(state, collected)
        else:  # never drawn again, so that failures stay counted
            collected = self.ahead.first(state, item)
            experience = self.timed_experience(state, collected)
        yield from self.split_updates(state, collected, *experience)

    def collect_item(self, state: TrainState, item, lag: int = 0) -> ScoredRollout:
        """`collect` with the item's key; `lag` tells apart the items drawn before one update."""
        return self.collect(state, item, self._key(state, ROLLOUT, lag))

    def timed_experience(self, state: TrainState, collected: ScoredRollout) -> tuple[dict, float]:
        """The result of `experience`, and its seconds."""
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
        times |= self.drafts.metrics() if self.drafts is not None else {}
        return collected._replace(metrics=collected.metrics | times)

    def generate(
        self, state: TrainState, item, key: jax.Array, sampling: SamplingConfig | None = None
    ) -> Rollout:
        """Samples a group of completions for each prompt from the current policy.

        Args:
          sampling: options of an evaluation; None: those of training, in `rollout_dtype`.
        """
        model = self.rollout_model if sampling is None else self.model
        how = self.tokenizer, self.partner, self.drafts if sampling is None else None
        params = self.model_params(state.params, state.frozen)
        return sample_rollout(model, params, item, key, sampling or self.sampling, *how)

    def score(self, rollout: Rollout, step: int = 0) -> ScoredRollout:
        """Scores every completion with the reward functions."""
        everywhere, told = self.rewards.in_process, self.callbacks
        return scoring.score_across_processes(
            lambda part: self.submit_rewards(part, step)(), rollout, everywhere, told
        )

    def submit_rewards(self, rollout: Rollout, step: int) -> Callable[[], ScoredRollout]:
        """Starts the reward functions on completions; returns a function that waits for them."""
        return scoring.submit_rewards(
            self.rewards,
            rollout,
            self._run_length.trainer_state(step),
            in_turns=self.has_environment,
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
        # Else the sampler's, which agree with the policy's to 1e-4 or better.
        if self.recomputes_old_logprobs:
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
        in_row, rows = self._rows(rollout)
        return rollout.arrays(in_row // rows, extra)

    def _rows(self, rollout: Rollout) -> tuple[int, int]:
        """Completions per row on one device; rows on a mesh for each, so that all are whole."""
        P, G = rollout.completion_lengths.shape
        in_row = self.row_size or math.gcd(P * G // self.gradient_accumulation_steps, G)
        in_block = P * G // (self._updates_per_pass * self.num_blocks)
        return in_row, in_row // math.gcd(in_block, in_row)

    def _split(self, rollout: Rollout, experience: dict, key: jax.Array) -> Iterator[dict]:
        """Yields the batches of all updates."""
        prompts = len(rollout.completion_lengths)
        if self.prompts_per_item not in (None, prompts):
            raise ValueError(
                f"an item must have {self.prompts_per_item} prompts (prompts_per_item), got "
                f"{prompts}. Drop the last, shorter item."
            )
        sizes = {"count": self.num_iterations, "updates": self._updates_per_pass}
        together = self._rows(rollout)[1]
        for part in passes(self._arrays(rollout, experience), key, together=together, **sizes):
            yield self.make_batch(part)

    def make_batch(self, arrays: dict[str, np.ndarray]):
        """The batch of an update, from its arrays with leading axis N.

        Micro-batches and devices get about equal numbers of tokens.
        """
        sizes = arrays["prompt_lengths"] + arrays["completion_lengths"].sum(axis=1)
        sizes = sizes * arrays.get("laid", True)
        order = deal(sizes.tolist(), self.num_blocks)
        return self.pack({name: value[order] for name, value in arrays.items()})

    def pack(self, item: dict[str, np.ndarray], blocks: int | None = None) -> dict:
        """Arrays with leading axis N, and the rows of their packed forest, see `pack_groups`.

        Groups that `item["laid"]` excludes, `[N]` bool, are not computed.
        """
        return pack_groups(item, [self.model], blocks or self.num_blocks, laid=item.get("laid"))

    def _metrics(self, collected: ScoredRollout) -> dict[str, float | int]:
        rollout, rewards, by_function, _, metrics = collected
        statistics = reward_metrics(rewards, by_function, self.reward_names, rollout.sources)
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
        sampled = dataclasses.replace(state, params=params)
        rollout = self.generate(sampled, item, key, self.eval_sampling)
        self._check(state, rollout)
        return scoring.evaluation_part(rollout, int(state.step), self.score, self.submit_rewards)

    def reduce_evaluation(self, parts: list[tuple]) -> dict[str, float]:
        """The mean reward and pass@k."""
        return evaluation_metrics(parts, self.reward_names, self.pass_reward)

    def _key(self, state: TrainState, stream: int | np.integer, lag: int = 0) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.rng, stream), state.step)
        return jax.random.fold_in(key, lag) if lag else key
