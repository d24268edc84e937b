"""A rollout: prompts, the groups of completions drawn for them, and what is counted about them.

Axes: P prompts, G completions of a group, L tokens of a prompt, C tokens of a completion.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from relax.rewards import RewardBatch, weighted_total
from relax.sampling import SampleOutput, SamplingConfig


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and their completions; tokens are padded on the right, and lengths say what is real.

    Attributes:
      rows: `[P]`, the data set's row of each prompt.
      prompt_ids, prompt_lengths: `[P, L]` and `[P]` int32.
      completion_ids, completion_lengths: `[P, G, C]` and `[P, G]` int32, the end token included.
      logprobs: `[P, G, C]` float32, of each token under the distribution it was drawn from; NaN
        where it was not drawn but written by an environment.
      finish: `[P, G]` str, why each ended: `eos`, `stop` or `length`.
      texts: `[P][G]`, the completions without special tokens.
      environment_rewards: `[P, G]` float64, what an environment gave; NaN where there is none.
    """

    rows: list[dict]
    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    completion_ids: np.ndarray
    completion_lengths: np.ndarray
    logprobs: np.ndarray
    finish: np.ndarray
    texts: list[list[str]]
    environment_rewards: np.ndarray

    @property
    def truncated(self) -> np.ndarray:
        """`[P, G]` bool: the completion did not end by itself."""
        return self.finish == "length"

    @property
    def mask(self) -> np.ndarray:
        """`[P, G, C]` bool: the tokens that the policy wrote."""
        places = np.arange(self.completion_ids.shape[2])[None, None, :]
        return (places < self.completion_lengths[:, :, None]) & ~np.isnan(self.logprobs)

    def take(self, prompts: Sequence[int]) -> "Rollout":
        """The groups of some prompts, in that order."""
        chosen = list(prompts)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Rollout(
            **{
                name: value[chosen] if isinstance(value, np.ndarray) else [value[i] for i in chosen]
                for name, value in values.items()
            }
        )


class ScoredRollout(NamedTuple):
    """Completions and their rewards.

    Attributes:
      rollout: the completions.
      rewards: `[P, G]` float64, the weighted sums; NaN where no function applies.
      by_function: `[P, G, F]` float64, NaN where a function does not apply or failed.
      extras: `[P, G]` columns that reward functions logged, by name.
      metrics: numbers to log.
    """

    rollout: Rollout
    rewards: np.ndarray
    by_function: np.ndarray
    extras: dict[str, np.ndarray]
    metrics: dict[str, float | int]

    def take(self, prompts: Sequence[int]) -> "ScoredRollout":
        """The groups of some prompts, in that order, with the same metrics."""
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
) -> Rollout:
    """The rollout that an item's prompts and the sampler's output for them make.

    Args:
      item: `prompt_ids` and `rows` of P prompts.
      output: of `P * sampling.n` completions.
      sampling: the `SamplingConfig` of `output`.
      decode: tokens to text.
      environment_rewards: `[P * G]`, of an environment.
    """
    prompts, G = item["prompt_ids"], sampling.n
    P = len(prompts)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    ends = np.asarray(output.lengths, np.int32)
    C = bucket(int(ends.max()), sampling.max_new_tokens)
    texts = [decode(completion) for completion in output.completions]
    return Rollout(
        rows=list(item["rows"]),
        prompt_ids=padded(prompts, bucket(int(lengths.max()))),
        prompt_lengths=lengths,
        completion_ids=_pad(output.tokens, C).reshape(P, G, C),
        completion_lengths=ends.reshape(P, G),
        logprobs=_pad(output.logprobs, C).reshape(P, G, C),
        finish=np.array(output.finish_reasons).reshape(P, G),
        texts=[texts[p * G : (p + 1) * G] for p in range(P)],
        environment_rewards=(
            np.full(P * G, np.nan) if environment_rewards is None else environment_rewards
        ).reshape(P, G),
    )


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """The groups of several rollouts, one after the other."""
    joined = {}
    for field in dataclasses.fields(Rollout):
        values = [getattr(rollout, field.name) for rollout in rollouts]
        if isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
        else:
            width = max(value.shape[-1] for value in values)
            ragged = field.name in ("prompt_ids", "completion_ids", "logprobs")
            padded = [_pad(value, width) for value in values] if ragged else values
            joined[field.name] = np.concatenate(padded)
    return Rollout(**joined)


def with_slot_after_eos(rollout: Rollout, most: int) -> Rollout:
    """Padded so that there is a place behind every completion of fewer tokens than `most`."""
    width = bucket(int(rollout.completion_lengths.max()) + 1, most)
    if width <= rollout.completion_ids.shape[2]:
        return rollout
    wider = {n: _pad(getattr(rollout, n), width) for n in ("completion_ids", "logprobs")}
    return dataclasses.replace(rollout, **wider)


def bucket(length: int, limit: int | None = None) -> int:
    """A length to pad to, of few: powers of two from 8 on and what lies halfway between them.

    >>> [bucket(n) for n in (1, 8, 9, 13, 17, 100)]
    [8, 8, 12, 16, 24, 128]
    >>> bucket(100, limit=110)
    110
    """
    size = 8
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if limit is None else min(size, limit)


def padded(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """`[n, width]` int32, each sequence followed by zeros."""
    out = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out


def with_eos(sampling: SamplingConfig, tokenizer) -> SamplingConfig:
    """With the tokenizer's end token, where nothing else ends a completion."""
    if sampling.eos_token_ids or tokenizer.eos_token_id is None:
        return sampling
    return dataclasses.replace(sampling, eos_token_ids=(tokenizer.eos_token_id,))


def is_truncated(sampling: SamplingConfig) -> bool:
    """Whether completions are drawn from another distribution than the policy's own."""
    return bool(
        sampling.top_k
        or sampling.top_p < 1
        or sampling.min_p
        or sampling.repetition_penalty != 1
        or sampling.logit_bias
        or sampling.min_new_tokens
    )


def warn_of_failures(scores: RewardBatch, count: int) -> None:
    """Tells how many of `count` completions a reward function failed on, and of the first."""
    failed = len({failure.index for failure in scores.failures})
    if failed:
        warnings.warn(
            f"rewards could not be had for {failed} of {count} completions; {scores.failures[0]}",
            stacklevel=2,
        )


def warn_of_none(scores: RewardBatch, texts: Sequence[str]) -> None:
    """Tells how many completions no function applies to."""
    none = np.flatnonzero(np.isnan(scores.total))
    if none.size:
        warnings.warn(
            f"{none.size} of {len(texts)} completions have no reward from any function, and teach "
            f"nothing, such as {texts[none[0]][:200]!r}",
            stacklevel=2,
        )


def collect_scores(
    rollout: Rollout, scores: RewardBatch, *, with_environment_rewards: bool
) -> ScoredRollout:
    """The rewards of a rollout; what an environment gave is a function of its own, the last."""
    shape = rollout.completion_lengths.shape
    rewards = scores.total.reshape(shape)
    by_function = scores.rewards.reshape(*shape, scores.rewards.shape[1])  # there may be none
    if with_environment_rewards:
        by_function = np.concatenate([by_function, rollout.environment_rewards[:, :, None]], axis=2)
        both = np.stack([rewards, rollout.environment_rewards], axis=2).reshape(-1, 2)
        rewards = weighted_total(both, np.ones(2)).reshape(shape)
    extras = {name: _objects(values).reshape(shape) for name, values in scores.extras.items()}
    metrics = scores.metrics | {"reward_errors": len(scores.failures)}
    return ScoredRollout(rollout, rewards, by_function, extras, metrics)


def completion_records(
    collected: ScoredRollout, names: Sequence[str], advantages: np.ndarray | None
) -> list[dict]:
    """One per completion: what a table of completions shows."""
    rollout, rewards, by_function, extras, _ = collected
    records = []
    for p, g in np.ndindex(*rewards.shape):
        record = {
            "prompt": rollout.rows[p]["prompt"],
            "completion": rollout.texts[p][g],
            "finish": str(rollout.finish[p, g]),
            "tokens": int(rollout.completion_lengths[p, g]),
            "rewards": dict(zip(names, by_function[p, g].tolist(), strict=True)),
            "reward": float(rewards[p, g]),
        }
        if advantages is not None and advantages.ndim == 2:
            record["advantage"] = float(advantages[p, g])
        # What a function calls like one of these does not take its place.
        logged = {name: values[p, g] for name, values in extras.items()}
        records.append(record | {f"logged_{n}" if n in record else n: logged[n] for n in logged})
    return records


def _objects(values: list) -> np.ndarray:
    """One object an item, lists included."""
    out = np.empty(len(values), object)
    out[:] = values
    return out


def rollout_metrics(rollout: Rollout) -> dict[str, float | int]:
    """Metrics of completions under TRL's names; `clipped_ratio` is the share truncated."""
    lengths, truncated = rollout.completion_lengths, rollout.truncated
    ended = lengths[~truncated]
    ended = ended if ended.size else np.zeros(1)
    metrics = {
        "num_tokens": int(lengths.sum() + rollout.prompt_lengths.sum() * lengths.shape[1]),
        "completions/clipped_ratio": float(truncated.mean()),
    }
    for name, of in (("length", lengths), ("terminated_length", ended)):
        for statistic in ("mean", "min", "max"):
            metrics[f"completions/{statistic}_{name}"] = float(getattr(of, statistic)())
    return metrics


def reward_metrics(
    rewards: np.ndarray, by_function: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Statistics of rewards `[P, G]`, and of each function's `[P, G, F]`; NaN: not applicable.

    What applies to no completion is left out: a mean over several rollouts is of the others. So are
    the statistics of groups where a group is a single completion.
    """
    metrics = {
        "reward": _mean(rewards),
        "reward_std": _std(rewards),
    }
    if rewards.shape[1] > 1:
        spread = np.array([_std(group) for group in rewards])
        metrics["reward_group_std"] = _mean(spread)
        metrics["frac_reward_zero_std"] = float((spread < 1e-6).mean())
    for i, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = _mean(by_function[..., i])
        metrics[f"rewards/{name}/std"] = _std(by_function[..., i])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    real = values[~np.isnan(values)]
    return float(real.mean()) if real.size else float("nan")


def _std(values: np.ndarray) -> float:
    """Unbiased, of what applies; 0 of fewer than two."""
    real = values[~np.isnan(values)]
    return float(real.std(ddof=1)) if real.size > 1 else 0.0


def _pad(value: np.ndarray, width: int) -> np.ndarray:
    gaps = [(0, 0)] * (value.ndim - 1) + [(0, width - value.shape[-1])]
    return np.pad(value, gaps)
