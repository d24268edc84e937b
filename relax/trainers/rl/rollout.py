"""A rollout: prompts, the groups of completions sampled for them, and their metrics.

Axes: P prompts, G completions of a group, L tokens of a prompt, C tokens of a completion.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from relax.data.batching import bucket
from relax.errors import RewardError
from relax.rewards import RewardBatch, weighted_total
from relax.rewards.protocol import MAX_REWARD
from relax.sampling import SampleOutput, SamplingConfig

PER_TOKEN = ("completion_ids", "mask", "logprobs", "branches")  # fields of a rollout, `[P, G, C]`


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and their completions, padded on the right.

    Attributes:
      rows: `[P]`, the dataset row of each prompt.
      prompt_ids, prompt_lengths: `[P, L]` and `[P]` int32.
      completion_ids, completion_lengths: `[P, G, C]` and `[P, G]` int32, the end token included.
      mask: `[P, G, C]` bool, true on tokens that the policy wrote, false on padding and on text of
        an environment. A NaN among `logprobs` is an error and never stands for a masked token.
      logprobs: `[P, G, C]` float32 nats, of each token under the distribution it was sampled from;
        0 where `mask` is false.
      branches: `[P, G, C]` int32: the number of the branch that a token belongs to, in completions
        that are several branches behind the prompt, one after another; else 0.
      finish: `[P, G]` str, the finish reasons: `eos`, `stop`, `length`, or `error`, of an episode
        whose environment or agent failed and that gets no reward.
      texts: `[P][G]`, the completions without special tokens.
      environment_rewards: `[P, G]` float64 from an environment; NaN if there is none.
      messages: `[P][G]`, the messages of each completion, in chats with tools or an environment.
      episodes: `[P][G]`, counts and errors of each one's turns, see `Episode.record`; empty without
        tools and environments.
      sources: `[P]` str, the name of each prompt's source; "" where there is no mixture.
      columns: `[P][G]`, what reward functions get of each one beside its row's columns.
    """

    rows: list[dict]
    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    completion_ids: np.ndarray
    completion_lengths: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    branches: np.ndarray
    finish: np.ndarray
    texts: list[list[str]]
    environment_rewards: np.ndarray
    messages: list[list[list[dict] | None]]
    episodes: list[list[dict]]
    sources: np.ndarray
    columns: list[list[dict]]

    @property
    def truncated(self) -> np.ndarray:
        """`[P, G]` bool: the completion reached the length limit."""
        return self.finish == "length"

    def arrays(self, g: int, extra: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Prompts and completions, and `extra` arrays `[P, G, ...]`, as `[P * G / g, g, ...]`."""
        rows = self.completion_lengths.shape[1] // g
        prompts = {
            name: np.repeat(getattr(self, name), rows, axis=0)
            for name in ("prompt_ids", "prompt_lengths")
        }
        completions = {
            "completion_ids": self.completion_ids,
            "completion_lengths": self.completion_lengths,
        } | (extra or {})
        if self.branches.any():
            completions["branches"] = self.branches
        return prompts | {
            name: value.reshape(-1, g, *value.shape[2:]) for name, value in completions.items()
        }

    def take(self, prompts: Sequence[int] | np.ndarray) -> "Rollout":
        """The groups of the given prompts, in that order."""
        chosen = list(prompts)

        def some(value):
            return value[chosen] if isinstance(value, np.ndarray) else [value[i] for i in chosen]

        return Rollout(**{f.name: some(getattr(self, f.name)) for f in dataclasses.fields(self)})


class ScoredRollout(NamedTuple):
    """Completions and their rewards.

    Attributes:
      rollout: the completions.
      rewards: `[P, G]` float64, the weighted sums; NaN if no function applies, else finite.
      by_function: `[P, G, F]` float64, NaN if a function does not apply or failed.
      extras: `[P, G]` columns that reward functions logged, by name.
      metrics: numbers to log.
    """

    rollout: Rollout
    rewards: np.ndarray
    by_function: np.ndarray
    extras: dict[str, np.ndarray]
    metrics: dict[str, float | int]

    def take(self, prompts: Sequence[int] | np.ndarray) -> "ScoredRollout":
        """The groups of the given prompts, in that order, with the same metrics."""
        chosen = list(prompts)
        extras = {name: values[chosen] for name, values in self.extras.items()}
        return ScoredRollout(
            self.rollout.take(chosen),
            self.rewards[chosen],
            self.by_function[chosen],
            extras,
            self.metrics,
        )


def make_rollout(
    item: dict,
    output: SampleOutput,
    sampling: SamplingConfig,
    decode: Callable[[Sequence[int]], str],
    environment_rewards: np.ndarray | None = None,
    messages: Sequence[list[dict] | None] | None = None,
    episodes: Sequence[dict] | None = None,
    branches: np.ndarray | None = None,
    columns: Sequence[dict] | None = None,
) -> Rollout:
    """Arranges the sampler's output by prompt and completion.

    Args:
      item: `prompt_ids` and `rows` of P prompts, and perhaps the names of their `sources`.
      output: `P * sampling.n` completions, with the mask of tokens that the policy wrote.
      sampling: the configuration that `output` was sampled with.
      decode: turns tokens into text.
      environment_rewards, messages, episodes: `[P * G]`, see `Rollout`; None: there are none.
      branches: of the tokens of `output`, see `Rollout`; None: one each.
      columns: `[P * G]`, see `Rollout`; None: none.
    """
    prompts, G = item["prompt_ids"], sampling.n
    P = len(prompts)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    ends = np.asarray(output.lengths, np.int32)
    C = bucket(int(ends.max()), sampling.max_new_tokens)
    texts = [decode(completion) for completion in output.completions]

    def by_prompt(values: Sequence) -> list[list]:
        return [list(values[p * G : (p + 1) * G]) for p in range(P)]

    return Rollout(
        rows=list(item["rows"]),
        prompt_ids=padded(prompts, bucket(int(lengths.max()))),
        prompt_lengths=lengths,
        completion_ids=_pad(output.tokens, C).reshape(P, G, C),
        completion_lengths=ends.reshape(P, G),
        mask=_pad(output.mask, C).reshape(P, G, C),
        logprobs=_pad(output.logprobs, C).reshape(P, G, C),
        branches=np.zeros((P, G, C), np.int32)
        if branches is None
        else _pad(branches, C).reshape(P, G, C),
        finish=np.array(output.finish_reasons).reshape(P, G),
        texts=by_prompt(texts),
        environment_rewards=(
            np.full(P * G, np.nan) if environment_rewards is None else environment_rewards
        ).reshape(P, G),
        messages=by_prompt(messages or [None] * (P * G)),
        episodes=by_prompt(episodes or [{}] * (P * G)),
        sources=np.array(item.get("sources", [""] * P)),
        columns=by_prompt(columns or [{}] * (P * G)),
    )


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Concatenates the groups of several rollouts."""

    def joined(name: str):
        values = [getattr(rollout, name) for rollout in rollouts]
        if isinstance(values[0], list):
            return [row for value in values for row in value]
        if name in ("prompt_ids", *PER_TOKEN):
            width = max(value.shape[-1] for value in values)
            values = [_pad(value, width) for value in values]
        return np.concatenate(values)

    return Rollout(**{field.name: joined(field.name) for field in dataclasses.fields(Rollout)})


def with_slot_after_eos(rollout: Rollout, most: int) -> Rollout:
    """Pads so that every completion shorter than `most` has a slot after its last token."""
    width = bucket(int(rollout.completion_lengths.max()) + 1, most)
    if width <= rollout.completion_ids.shape[2]:
        return rollout
    wider: dict = {name: _pad(getattr(rollout, name), width) for name in PER_TOKEN}
    return dataclasses.replace(rollout, **wider)


def padded(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """`[n, width]` int32, each sequence followed by zeros."""
    out = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out


def with_eos(sampling: SamplingConfig, tokenizer) -> SamplingConfig:
    """Adds the tokenizer's EOS token unless `sampling` has EOS tokens already."""
    if sampling.eos_token_ids or tokenizer.eos_token_id is None:
        return sampling
    return dataclasses.replace(sampling, eos_token_ids=(tokenizer.eos_token_id,))


def is_truncated(sampling: SamplingConfig) -> bool:
    """Whether completions are sampled from another distribution than the policy's.

    Then the sampler's log-probabilities are renormalised over the remaining tokens and would bias
    the ratio, so old log-probabilities are computed by a forward pass.
    """
    return bool(
        sampling.top_k
        or sampling.top_p < 1
        or sampling.min_p
        or sampling.repetition_penalty != 1
        or sampling.logit_bias
        or sampling.min_new_tokens
    )


def warn_of_failures(scores: RewardBatch, count: int) -> None:
    """Warns about completions that a reward function failed on; shows the first failure."""
    failed = len({failure.index for failure in scores.failures})
    if failed:
        warnings.warn(
            f"reward functions failed on {failed} of {count} completions; {scores.failures[0]}",
            stacklevel=2,
        )


def warn_of_none(scores: RewardBatch, texts: Sequence[str]) -> None:
    """Warns about completions that no reward function applies to."""
    none = np.flatnonzero(np.isnan(scores.total))
    if none.size:
        warnings.warn(
            f"{none.size} of {len(texts)} completions have no reward from any function and are not "
            f"trained on, such as {texts[none[0]][:200]!r}",
            stacklevel=2,
        )


def collect_scores(
    rollout: Rollout, scores: RewardBatch, *, with_environment_rewards: bool
) -> ScoredRollout:
    """Arranges rewards by prompt and completion; an environment's become the last function's.

    Raises:
      RewardError: a sum of rewards exceeds ±`MAX_REWARD`.
    """
    shape = rollout.completion_lengths.shape
    rewards = scores.total.reshape(shape)
    by_function = scores.rewards.reshape(*shape, scores.rewards.shape[1])  # there may be none
    if with_environment_rewards:
        by_function = np.concatenate([by_function, rollout.environment_rewards[:, :, None]], axis=2)
        both = np.stack([rewards, rollout.environment_rewards], axis=2).reshape(-1, 2)
        rewards = weighted_total(both, np.ones(2)).reshape(shape)
    failed = rollout.finish == "error"  # there is no whole episode to score
    rewards, by_function = rewards.copy(), by_function.copy()
    rewards[failed], by_function[failed] = np.nan, np.nan
    # NaN is allowed: no function applies. A sum of finite rewards may overflow.
    if (extreme := np.argwhere(np.abs(rewards) > MAX_REWARD)).size:
        p, g = extreme[0]
        raise RewardError(
            f"rewards of a completion must add up to a number within ±{MAX_REWARD:g}, got "
            f"{rewards[p, g]:g} for {rollout.texts[p][g][:200]!r} ({len(extreme)} of "
            f"{rewards.size} completions). Scale the reward functions or their weights down."
        )
    extras = {name: _objects(values).reshape(shape) for name, values in scores.extras.items()}
    metrics = scores.metrics | {"reward_errors": len(scores.failures)}
    return ScoredRollout(rollout, rewards, by_function, extras, metrics)


def _objects(values: list) -> np.ndarray:
    """An array of objects, one per item, even if the items are lists."""
    out = np.empty(len(values), object)
    out[:] = values
    return out


def has_zero_std(rewards: np.ndarray) -> np.ndarray:
    """`[P]` bool: whether a group's rewards `[P, G]` are all equal, or fewer than two exist."""
    highest = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    lowest = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    # Uses the range, since the standard deviation of equal numbers rounds to about 1e-14.
    return ~(highest - lowest > 1e-6)


def _pad(value: np.ndarray, width: int) -> np.ndarray:
    gaps = [(0, 0)] * (value.ndim - 1) + [(0, width - value.shape[-1])]
    return np.pad(value, gaps)
