"""What reinforcement learning with completions has in common: from prompts to experience.

One item of the loader, `{"prompt_ids": [...], "rows": [...]}`, becomes updates in three steps:

1. `generate`: every prompt gets a group of completions, drawn by the current policy.
2. `score`: reward functions judge each completion.
3. `experience`: an algorithm turns rewards into what its loss needs: advantages, log-probabilities.

The weights that generate are the weights that are trained: no copy, no second engine. All that is
random follows from (root key, update), so a run that goes on after a kill draws the same texts.

Axes: P prompts, G completions of a group, g of them in a row, L tokens of a prompt, C tokens of a
completion, D model, F reward functions.
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.losses import IGNORED
from relax.losses.logprobs import TokenLogprobs, linear_logprobs
from relax.losses.masked import masked_mean
from relax.losses.policy import log_ratios
from relax.models.forward import completion_states
from relax.parallel import processes
from relax.rewards import Environment, RewardRunner
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.trainers.rl.episodes import rollout_episodes
from relax.trainers.rl.rollout import (
    Rollout,
    ScoredRollout,
    completion_records,
    is_truncated,
    make_rollout,
    reward_metrics,
    rollout_metrics,
    with_eos,
)
from relax.trainers.rl.scoring import RunLength, score_across_processes, submit_rewards
from relax.trainers.state import TrainState, initial_state
from relax.trainers.trainer import LoggedBatch, Trainer
from relax.trainers.update import Max, Mean

# Streams of random numbers, folded into the root key before the update's number. `train_step` folds
# in that number alone, and no update has one of these.
ROLLOUT, EVALUATION, ORDER, RESAMPLING = (np.uint32(2**31 + n) for n in range(4))


class RLTrainer(Trainer):
    """Base of the algorithms that learn from the rewards of their own completions.

    A subclass supplies `experience` and `compute_loss`.

    Args:
      model, optimizer: as for `Trainer`; a `relax.models.Transformer`.
      reward_funcs: functions or names, see `relax.rewards`, or the `RewardRunner` that holds them.
      tokenizer: turns completions into text; its end token ends them unless `sampling` says more.
      sampling: how completions are drawn; `n` is set to the size of a group.
      freeze: as for `SFTTrainer`.
      environment: makes what the model talks to, one for each completion, which then has several
        turns (`relax.rewards.Environment`); what it gives is added to the rewards.
      reward_weights: of the functions in the sum; None: 1 each.
      num_generations: G, completions per prompt.
      prompts_per_item: prompts of an item of the loader; None: all completions of an item make one
        update, however many prompts it has.
      completions_per_update: divides prompts_per_item * num_generations.
      num_iterations: passes over the completions of an item.
      reference: hold the weights of the start, for a KL penalty. With adapters that is the model
        without them, and costs nothing.
      recompute_old_logprobs: by a forward pass, in place of the sampler's. Done in any case where
        the sampler drew from a truncated distribution, which is not the policy's.
      eval_sampling: how completions are drawn in evaluation; None: as in training.
      pass_reward: the reward from which on a completion passes, for pass@k.
      loss_chunk_size: tokens whose logits exist at once.
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
            raise ValueError("reward_funcs must name what judges completions, got none.")
        if given and reward_weights is not None:
            raise ValueError("a RewardRunner has its weights: leave reward_weights out.")
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
        self._updates_per_pass, self.row_size = _updates(
            num_generations,
            prompts_per_item,
            completions_per_update,
            self.gradient_accumulation_steps,
        )
        self._compiled_logprobs = jax.jit(self._token_logprobs)

    @abc.abstractmethod
    def experience(self, state: TrainState, collected: ScoredRollout) -> dict[str, np.ndarray]:
        """What `compute_loss` needs of each prompt's group: arrays with leading axes `[P, G]`."""

    @property
    def updates_per_item(self) -> int:
        return self.num_iterations * self._updates_per_pass

    def create_train_state(self, key: jax.Array) -> TrainState:
        params = self.initial_params()
        return initial_state(self.model, self.optimizer, key, params, self.freeze, self.reference)

    def make_batches(self, state: TrainState, item) -> Iterator[LoggedBatch]:
        """Rollout, rewards and experience of an item, then the batches of its updates."""
        key = self._key(state, ROLLOUT)
        with self.rewards.tally.undone_if_interrupted():
            collected = self.collect(state, item, key)
            start_s = time.monotonic()
            experience = self.experience(state, collected)
        metrics = self._metrics(collected) | self.experience_metrics(collected, experience)
        metrics["time/reference"] = time.monotonic() - start_s
        records = completion_records(collected, self.reward_names, experience.get("advantages"))
        for batch in self._split(collected.rollout, experience, self._key(state, ORDER)):
            yield LoggedBatch(batch, metrics, records)
            metrics, records = {}, ()

    def _evaluate(self, state: TrainState, loader, max_batches: int | None):
        with self.rewards.tally.undone_if_interrupted():
            return super()._evaluate(state, loader, max_batches)

    def experience_metrics(self, collected: ScoredRollout, experience: dict) -> dict:
        """Numbers to log about the experience of an item; here none."""
        return {}

    def collect(self, state: TrainState, item, key: jax.Array) -> ScoredRollout:
        """Completions of an item's prompts, and their rewards."""
        start_s = time.monotonic()
        rollout = self.generate(state, item, key)
        rolled_s = time.monotonic()
        collected = self.score(rollout, int(state.step))
        times = {"time/rollout": rolled_s - start_s, "time/reward": time.monotonic() - rolled_s}
        return collected._replace(metrics=collected.metrics | times)

    def generate(
        self, state: TrainState, item, key: jax.Array, sampling: SamplingConfig | None = None
    ) -> Rollout:
        """A group of completions for each prompt, drawn by the current policy."""
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
        """What the reward functions say of each completion."""
        return score_across_processes(
            lambda part: self.submit_rewards(part, step)(),
            rollout,
            everywhere=self.rewards.in_process,
        )

    def submit_rewards(self, rollout: Rollout, step: int) -> Callable[[], ScoredRollout]:
        """Hands completions to the reward functions; what it returns waits for their answers."""
        decoding = {"decode": self.tokenizer.decode, "eos_token_ids": self.sampling.eos_token_ids}
        in_turns, state = self.environment is not None, self._run_length.trainer_state(step)
        return submit_rewards(self.rewards, rollout, state, in_turns=in_turns, **decoding)

    def completion_logprobs(
        self, params, batch, rng: jax.Array | None = None
    ) -> tuple[TokenLogprobs, jax.Array | None]:
        """Log-probabilities `[P, g, C]` of a batch's completions, at the sampler's temperature.

        Also gives the routers' load-balancing loss, or None. `params` are all parameters.
        """
        hidden, aux_loss = completion_states(self.model, params, batch, rng)
        return self.logprobs_of(params, hidden, batch), aux_loss

    def logprobs_of(self, params, hidden: jax.Array, batch) -> TokenLogprobs:
        """As `completion_logprobs`, from the states `[P, g, C, D]` before the tokens."""
        ids, lengths = batch["completion_ids"], batch["completion_lengths"]
        real = jnp.arange(ids.shape[2])[None, None, :] < lengths[:, :, None]
        out = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            self.model.output_matrix(params),
            jnp.where(real, ids, IGNORED).reshape(-1),
            temperature=self.sampling.temperature,
            softcap=self.model.config.final_logit_softcapping,
            chunk_size=self.loss_chunk_size,
        )
        return TokenLogprobs(*(x.reshape(ids.shape) for x in out))

    def old_logprobs(self, state: TrainState, rollout: Rollout) -> np.ndarray:
        """`[P, G, C]` of a rollout's completions under the policy that drew them."""
        if self.recompute_old_logprobs or is_truncated(self.sampling):
            params = self.model_params(state.params, state.frozen)
            return self.token_logprobs(params, rollout)
        return rollout.logprobs

    def token_logprobs(self, params, rollout: Rollout) -> np.ndarray:
        """`[P, G, C]` of a rollout's completions under all parameters `params`, no gradient."""
        return self.per_token(rollout, lambda batch: self._compiled_logprobs(params, batch))

    def per_token(self, rollout: Rollout, function: Callable) -> np.ndarray:
        """What a function of batches gives for each token of a rollout, `[P, G, C]`.

        Rows go through the model as they do in an update, as many at once.
        """
        arrays = self._arrays(rollout)
        rows = len(arrays["prompt_ids"])
        size = max(1, rows // (self._updates_per_pass * self.gradient_accumulation_steps))
        parts = []
        for first in range(0, rows, size):
            batch = {name: value[first : first + size] for name, value in arrays.items()}
            parts.append(parallel.to_host(function(parallel.shard_batch(batch))))
        return np.concatenate(parts).reshape(rollout.completion_ids.shape)

    def _token_logprobs(self, params, batch):
        return self.completion_logprobs(params, batch)[0].logprobs

    def _arrays(self, rollout: Rollout, extra: dict | None = None) -> dict[str, np.ndarray]:
        """Arrays with one row per prompt and g of its completions: `[P * G / g, ...]`."""
        P, G = rollout.completion_lengths.shape
        g = self._in_row(P, G) // self._rows_for_one(P, G)
        rows = G // g
        arrays = {
            name: np.repeat(getattr(rollout, name), rows, axis=0)
            for name in ("prompt_ids", "prompt_lengths")
        }
        grouped = {
            "completion_ids": rollout.completion_ids,
            "completion_lengths": rollout.completion_lengths,
        } | (extra or {})
        return arrays | {
            name: value.reshape(-1, g, *value.shape[2:]) for name, value in grouped.items()
        }

    def _in_row(self, P: int, G: int) -> int:
        """Completions of a prompt that share a row, on one device."""
        return self.row_size or math.gcd(P * G // self.gradient_accumulation_steps, G)

    def _rows_for_one(self, P: int, G: int) -> int:
        """Rows of a mesh in place of one of a single device, so that each device has whole ones."""
        parts = self._updates_per_pass * self.gradient_accumulation_steps * parallel.batch_shards()
        return self._in_row(P, G) // math.gcd(P * G // parts, self._in_row(P, G))

    def _split(self, rollout: Rollout, experience: dict, key: jax.Array) -> Iterator[dict]:
        """The batches of all updates: every pass in another order, where there are several."""
        prompts = len(rollout.completion_lengths)
        if self.prompts_per_item not in (None, prompts):
            raise ValueError(
                f"an item must hold {self.prompts_per_item} prompts (prompts_per_item), got "
                f"{prompts}. Drop the last, shorter item."
            )
        arrays = self._arrays(rollout, experience)
        rows = len(arrays["prompt_ids"])
        size, buffer = rows // self._updates_per_pass, self.buffer(arrays)
        for iteration in range(self.num_iterations):
            order = np.arange(rows)
            if self.updates_per_item > 1:
                n = self._rows_for_one(*rollout.completion_lengths.shape)  # stay together
                fresh = jax.random.fold_in(key, iteration)
                order = np.asarray(jax.random.permutation(fresh, rows // n))
                order = (order[:, None] * n + np.arange(n)[None, :]).reshape(-1)
            for first in range(0, rows, size):
                yield self.take(buffer, order[first : first + size])

    def buffer(self, arrays: dict[str, np.ndarray]):
        """Where the rows of an item stay while they are trained on; here as they are."""
        return arrays

    def take(self, buffer, rows: np.ndarray):
        """The batch of some rows."""
        return {name: value[rows] for name, value in buffer.items()}

    def _metrics(self, collected: ScoredRollout) -> dict[str, float | int]:
        rollout, rewards, by_function, _, metrics = collected
        rewards = reward_metrics(rewards, by_function, self.reward_names)
        return rollout_metrics(rollout) | rewards | metrics

    def evaluate_item(self, state: TrainState, params, item, index: int) -> Callable[[], tuple]:
        """Held-out prompts, completed as `eval_sampling` says, and what that is worth.

        They are scored while the next ones are completed. In training there is nothing to judge
        beside: the next rollout waits for an update, which waits for the rewards.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.rng, EVALUATION), index)
        step, state = int(state.step), state.replace(params=params)
        rollout = self.generate(state, item, key, self.eval_sampling)
        alone = processes.count() == 1
        collected = (
            self.submit_rewards(rollout, step) if alone else lambda: self.score(rollout, step)
        )

        def part() -> tuple:
            rollout, rewards, by_function, _, metrics = collected()
            return rewards, by_function, rollout.completion_lengths, metrics["reward_errors"]

        return part

    def reduce_evaluation(self, parts: list[tuple]) -> dict[str, float]:
        """Mean reward and pass@k."""
        rewards, by_function, lengths, errors = zip(*parts, strict=True)
        rewards, by_function = np.concatenate(rewards), np.concatenate(by_function)
        passed = np.nan_to_num(rewards, nan=-math.inf) >= self.pass_reward
        return reward_metrics(rewards, by_function, self.reward_names) | {
            "pass@1": float(passed.mean()),
            f"pass@{passed.shape[1]}": float(passed.any(axis=1).mean()),
            "completions/mean_length": float(np.concatenate([x.ravel() for x in lengths]).mean()),
            "reward_errors": sum(errors),
        }

    def _key(self, state: TrainState, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(state.rng, stream), state.step)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def difference_metrics(logprobs: jax.Array, sampled: jax.Array, mask: jax.Array) -> dict:
    """How far the trainer's log-probabilities are from the sampler's."""
    difference = jnp.abs(log_ratios(logprobs, sampled, mask))
    return {
        "sampling/logp_difference/mean": Mean(masked_mean(difference, mask), mask.sum()),
        "sampling/logp_difference/max": Max(jnp.where(mask, difference, 0.0).max()),
    }


def _updates(
    num_generations: int,
    prompts_per_item: int | None,
    completions_per_update: int | None,
    gradient_accumulation_steps: int,
) -> tuple[int, int | None]:
    """Updates per pass over an item, and completions that share their prompt's row.

    Raises:
      ValueError: the numbers do not divide each other.
    """
    G = num_generations
    if completions_per_update is None:
        return 1, None
    if prompts_per_item is None:
        raise ValueError("completions_per_update needs prompts_per_item: give both, or none.")
    total = prompts_per_item * G
    micro, rest = divmod(completions_per_update, gradient_accumulation_steps)
    if rest or total % completions_per_update:
        raise ValueError(
            f"completions_per_update must divide the {prompts_per_item} x {G} completions of an "
            f"item and be a multiple of gradient_accumulation_steps, got {completions_per_update} "
            f"and {gradient_accumulation_steps}."
        )
    return total // completions_per_update, math.gcd(micro, G)
