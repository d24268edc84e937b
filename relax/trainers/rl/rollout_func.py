"""Completions made by a function of the user, under TRL's name `rollout_func`.

def rollout_func(prompts, policy):
    found = policy.generate(policy.prompt_ids)
    return {name: [one[name] for one in found]
            for name in ("prompt_ids", "completion_ids", "logprobs")}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from relax import parallel
from relax.errors import ConfigError, RewardError
from relax.parallel import processes
from relax.rewards.protocol import check_plain
from relax.sampling import SampleOutput, SamplingConfig, generate, stop_decoder
from relax.trainers.rl.rollout import Rollout, make_rollout

# Folded into a rollout's key to separate the keys of the function's calls from others.
FUNCTION_STREAM = np.uint32(106)
REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


class Policy:
    """The current policy, as a rollout function gets it in place of TRL's trainer.

    Attributes:
      rows: `[P * G]`, the row of the data set of each completion.
      prompt_ids: `[P * G]`, the tokens of its prompt.
      sampling: the options of sampling.
      tokenizer, processing_class: the tokenizer, by its own name and TRL's.
      key: a random key that is different in every rollout.
    """

    def __init__(self, model, params, item: dict, key, sampling: SamplingConfig, tokenizer):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.processing_class, self.key = tokenizer, jax.random.fold_in(key, FUNCTION_STREAM)
        self.sampling = dataclasses.replace(sampling, n=1)
        self.rows = [row for row in item["rows"] for _ in range(sampling.n)]
        self.prompt_ids = [list(ids) for ids in item["prompt_ids"] for _ in range(sampling.n)]
        self._calls = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int | None = None
    ) -> list[dict]:
        """Samples one completion of each prompt, as TRL's `generate_rollout_completions` does.

        Args:
          prompt_ids: token ids of any number of prompts.
          max_new_tokens: maximum tokens of each; None: those of the run.

        Returns:
          For each prompt its `prompt_ids`, and `completion_ids`, `logprobs` and `text`.
        """
        key = jax.random.fold_in(self.key, self._calls)
        self._calls += 1
        config = self.sampling
        if max_new_tokens is not None:
            config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
        prompts = [[int(i) for i in ids] for ids in prompt_ids]
        decode = stop_decoder(self.tokenizer)
        out = generate(self.model, self.params, prompts, key, config, decode=decode)
        logprobs = [row[:n].tolist() for row, n in zip(out.logprobs, out.lengths, strict=True)]
        return [
            {
                "prompt_ids": prompt,
                "completion_ids": ids,
                "logprobs": own,
                "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            }
            for prompt, ids, own in zip(prompts, out.completions, logprobs, strict=True)
        ]


class RolloutFunction:
    """Makes rollouts by a function of the user.

    Args:
      function: takes the prompts, as the data has them and each as often as it has completions, and
        a `Policy`. It returns lists with one entry per completion, by name: `prompt_ids`,
        `completion_ids`, `logprobs` of the sampler, perhaps `env_mask` (1: a token that the policy
        wrote), and columns for the reward functions.
      tokenizer: the policy's.

    Raises:
      ConfigError: it is no function, or the run has several devices or processes.
    """

    def __init__(self, function: Callable, tokenizer):
        if not callable(function):
            raise ConfigError(f"rollout_func must be a function, got {function!r}.")
        if parallel.layout() is not None or processes.count() > 1:
            raise ConfigError("rollout_func needs a single device and a single process.")
        self.function, self.tokenizer = function, tokenizer

    def rollout(self, model, params, item: dict, key, sampling: SamplingConfig) -> Rollout:
        """A rollout of an item's rows, in place of sampled completions.

        Raises:
          RewardError: the function returns what it may not.
        """
        policy = Policy(model, params, item, key, sampling, self.tokenizer)
        prompts = [row["prompt"] for row in policy.rows]
        found = self.function(prompts, policy)
        lists = _checked(found, len(prompts))
        starts = _prompts(lists["prompt_ids"], sampling.n)
        output = _output(lists, sampling, model.config.vocab_size)
        own = [name for name in lists if name not in (*REQUIRED, "env_mask")]
        for name in own:
            for i, (row, value) in enumerate(zip(policy.rows, lists[name], strict=True)):
                if name in row:
                    raise _refused(f"has {name!r}, which is a column of the data set too")
                check_plain(value, f"rollout_func's {name}[{i}]")
        columns = [{name: lists[name][i] for name in own} for i in range(len(prompts))]
        return make_rollout(
            item | {"prompt_ids": starts},
            output,
            sampling,
            lambda ids: self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True),
            columns=columns,
        )


def _refused(why: str) -> RewardError:
    return RewardError(f"what rollout_func returned {why}.")


def _checked(found, count: int) -> dict[str, list]:
    if not isinstance(found, Mapping) or any(name not in found for name in REQUIRED):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise _refused(f"must be a dict with {', '.join(REQUIRED)}, got {got}")
    lists = {name: list(values) for name, values in found.items() if values is not None}
    for name in dict.fromkeys((*REQUIRED, *lists)):
        if len(lists.get(name, ())) != count:
            raise _refused(
                f"must have one entry per completion, which are {count}, and {name} has "
                f"{len(lists.get(name, ()))}"
            )
    return lists


def _prompts(prompt_ids: list, n: int) -> list[list[int]]:
    """The prompts, which the completions of a group share."""
    groups = [[list(map(int, ids)) for ids in prompt_ids[i : i + n]] for i in _steps(prompt_ids, n)]
    for i, group in enumerate(groups):
        if not group[0] or any(ids != group[0] for ids in group):
            raise _refused(
                f"must have the same prompt_ids, at least one, for all {n} completions of prompt "
                f"{i}: put tokens that differ into completion_ids, with 0 in env_mask"
            )
    return [group[0] for group in groups]


def _steps(values: list, n: int) -> range:
    return range(0, len(values), n)


def _output(lists: dict[str, list], sampling: SamplingConfig, V: int) -> SampleOutput:
    """The completions as arrays."""
    rows, most = lists["completion_ids"], sampling.max_new_tokens
    masks = lists.get("env_mask") or [[1] * len(ids) for ids in rows]
    lengths = np.array([len(ids) for ids in rows], np.int32)
    shape = (len(rows), max(1, int(lengths.max())))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask = np.zeros(shape, bool)
    for i, (ids, own, wrote) in enumerate(zip(rows, lists["logprobs"], masks, strict=True)):
        n = len(ids)
        if not 1 <= n <= most:
            raise _refused(f"must have completions of 1 to {most} tokens, and number {i} has {n}")
        if len(own) != n or len(wrote) != n:
            raise _refused(
                f"must have a number for each token, and completion {i} has {n} tokens, "
                f"{len(own)} logprobs and {len(wrote)} entries of env_mask"
            )
        tokens[i, :n], mask[i, :n] = ids, np.asarray(wrote, bool)
        logprobs[i, :n] = np.where(mask[i, :n], np.asarray(own, np.float32), 0.0)
    if tokens.min() < 0 or tokens.max() >= V:
        raise _refused(f"must have tokens from 0 to {V - 1}, got {tokens.min()} and {tokens.max()}")
    eos = sampling.eos_token_ids

    def reason(ids: Sequence[int]) -> str:
        return "eos" if ids[-1] in eos else "length" if len(ids) == most else "stop"

    return SampleOutput(tokens, logprobs, mask, lengths, tuple(map(reason, rows)))
