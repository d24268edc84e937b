"""Multi-turn rollouts: the policy and an environment write in turns.

Every episode of a group is independent; unfinished ones are sampled together, each from all of its
tokens so far. An environment's answer is tokenised once and appended, and earlier text is never
tokenised again: the trained tokens are exactly the sampled ones. A turn's key depends only on the
numbers of its row and turn.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from relax.errors import RewardError
from relax.rewards import Environment, Episode
from relax.sampling import SampleOutput, SamplingConfig, generate

# Folded into a rollout's key to separate the keys of turns from those of rows, which `generate`
# folds into the same key. The value is arbitrary, but changing it would change recorded runs.
TURN_STREAM = 104


@dataclasses.dataclass
class _EpisodeState:
    """One episode and the sampler's log-probabilities of its tokens (0 on answers)."""

    environment: Environment
    episode: Episode
    logprobs: list[float]
    finish: str = ""

    @property
    def ids(self) -> list[int]:
        """All tokens so far, from which the next turn is sampled."""
        return [*self.episode.prompt_ids, *self.episode.completion_ids]

    def add_turn(
        self, ids: list[int], logprobs: list[float], reason: str, encode, decode, room: int
    ):
        """Adds a turn and the environment's answer.

        Args:
          ids, logprobs: the tokens sampled in this turn, and their log-probabilities.
          reason: the sampler's finish reason.
          encode, decode: as for `rollout_episodes`.
          room: tokens left for the turn and its answer.
        """
        self.logprobs += logprobs
        before = len(self.episode.completion_ids)
        if reason == "length":  # truncated within a turn: there is no answer
            self.finish = reason
            self.episode = dataclasses.replace(
                self.episode,
                completion_ids=(*self.episode.completion_ids, *ids),
                sampled=(*self.episode.sampled, *[True] * len(ids)),
            )
            return
        self.episode = self.episode.turn(ids, self.environment, encode, decode)
        shown = len(self.episode.completion_ids) - before - len(ids)
        self.logprobs += [0.0] * shown
        if self.episode.done:
            self.finish = reason
        elif len(ids) + shown >= room:
            self.finish = "length"


def rollout_episodes(
    model,
    params,
    item: dict,
    key: jax.Array,
    sampling: SamplingConfig,
    make_environment: Callable[[], Environment],
    encode: Callable[[str], list[int]],
    decode: Callable,
    stop_decode: Callable | None = None,
) -> tuple[dict, SampleOutput, np.ndarray]:
    """Rolls out `sampling.n` episodes of every prompt of an item.

    Args:
      model, params: the policy; `params` are all parameters.
      item: `prompt_ids` and `rows` of P prompts.
      key: the rollout's key.
      sampling: its `max_new_tokens` limits all turns and answers of an episode together.
      make_environment: makes one environment per episode.
      encode: turns text into ids, without special tokens.
      decode: turns ids into the text that the environment gets.
      stop_decode: turns ids into the text that is searched for stop strings; None: `decode`.

    Returns:
      The item, its prompts extended by the text that `reset` returned; the completions, whose
      `mask` is true on the tokens that the policy wrote; and the environments' rewards `[P * n]`,
      NaN if there is none.

    Raises:
      ValueError: `reset` returned different texts for the same prompt.
      RewardError: an environment returned a reward that is not finite.
    """
    groups = [
        _begin(row, ids, sampling.n, make_environment, encode)
        for row, ids in zip(item["rows"], item["prompt_ids"], strict=True)
    ]
    prompts = [list(group[0].episode.prompt_ids) for group in groups]
    states = [state for group in groups for state in group]
    keys = _row_keys(key, len(prompts), sampling.n)
    config = dataclasses.replace(sampling, n=1, stop=(*sampling.stop, *states[0].environment.stop))
    limit, turn = sampling.max_new_tokens, 0
    while unfinished := [i for i, state in enumerate(states) if not state.finish]:
        rooms = [limit - len(states[i].episode.completion_ids) for i in unfinished]
        out = generate(
            model,
            params,
            [states[i].ids for i in unfinished],
            jax.vmap(jax.random.fold_in, (0, None))(keys[np.array(unfinished)], turn),
            config,
            decode=stop_decode or decode,
            limits=rooms,
        )
        for n, (i, room) in enumerate(zip(unfinished, rooms, strict=True)):
            length = out.lengths[n]
            ids, logprobs = out.tokens[n, :length].tolist(), out.logprobs[n, :length].tolist()
            states[i].add_turn(ids, logprobs, out.finish_reasons[n], encode, decode, room)
        turn += 1
    rewards = np.array([_reward(state) for state in states], np.float64)
    return item | {"prompt_ids": prompts}, _output(states, limit), rewards


def _reward(state: _EpisodeState) -> float:
    """The episode's reward, or NaN if the environment gave none; raises if it is not finite."""
    reward = state.episode.reward
    if reward is not None and not math.isfinite(reward):
        raise RewardError(
            "rewards of an environment must be finite, or None for no reward, but those of "
            f"{type(state.environment).__name__} add up to {reward}. Correct its `step`."
        )
    return math.nan if reward is None else reward


def _begin(row, prompt_ids, n: int, make_environment, encode) -> list[_EpisodeState]:
    """Starts the episodes of one prompt."""
    group = []
    for _ in range(n):
        environment = make_environment()
        group.append(
            _EpisodeState(environment, Episode.start(environment, row, prompt_ids, encode), [])
        )
    if len({one.episode.prompt_ids for one in group}) > 1:
        raise ValueError(
            "an environment must start all episodes of a row with the same text, but "
            f"{type(group[0].environment).__name__}.reset does not. Make random choices in step."
        )
    return group


def _row_keys(key, prompts: int, n: int):
    key = jax.random.fold_in(key, TURN_STREAM)
    rows = np.arange(prompts * n)
    one = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))
    return one(rows // n, rows % n)


def _output(states: list[_EpisodeState], limit: int) -> SampleOutput:
    """The episodes as one completion each; an answer beyond the limit is truncated.

    `mask` is `Episode.sampled`: the environment's text is context and is not trained on.
    """
    lengths = np.array([min(len(s.episode.completion_ids), limit) for s in states], np.int32)
    shape = (len(states), int(lengths.max()))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask = np.zeros(shape, bool)
    for i, (state, length) in enumerate(zip(states, lengths, strict=True)):
        tokens[i, :length] = state.episode.completion_ids[:length]
        logprobs[i, :length] = state.logprobs[:length]
        mask[i, :length] = state.episode.sampled[:length]
    return SampleOutput(tokens, logprobs, mask, lengths, tuple(s.finish for s in states))
