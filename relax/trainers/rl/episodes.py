"""Rollouts of several turns: the model speaks, an environment answers, and so on.

Every episode of a group goes on by itself; those under way take their next turn together, each
behind all of its own tokens so far. What an environment answers is tokenised once and appended. A
turn's key follows from the row's and the turn's number alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from relax.rewards import Environment, Episode
from relax.sampling import SampleOutput, SamplingConfig, generate

TURNS = 104  # the stream of the turns' keys


@dataclasses.dataclass
class _EpisodeState:
    """One conversation, and what the sampler said of its tokens."""

    environment: Environment
    episode: Episode
    logprobs: list[float]
    finish: str = ""

    def take(self, ids: list[int], logprobs: list[float], reason: str, encode, decode, room: int):
        """The episode behind one turn; `room` is what was left for it."""
        self.logprobs += logprobs
        before = len(self.episode.completion_ids)
        if reason == "length":  # cut in the middle of a turn: there is nothing to answer
            self.finish = reason
            self.episode = dataclasses.replace(
                self.episode,
                completion_ids=(*self.episode.completion_ids, *ids),
                sampled=(*self.episode.sampled, *[True] * len(ids)),
            )
            return
        self.episode = self.episode.turn(ids, self.environment, encode, decode)
        shown = len(self.episode.completion_ids) - before - len(ids)
        self.logprobs += [np.nan] * shown
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
    """Plays `sampling.n` episodes of every prompt of an item.

    Args:
      sampling: `max_new_tokens` bounds all turns and answers of an episode together.
      make_environment: makes one environment per episode.
      encode: text to ids, without special tokens.
      decode: ids to the text that the environment sees.
      stop_decode: ids to the text that stop strings are looked for in; None: `decode`.

    Returns:
      The item, whose prompts hold what environments showed first; the completions, with NaN for the
      log-probability of tokens that the environment wrote; and the rewards given, `[R]`, NaN where
      none was.

    Raises:
      ValueError: environments show one prompt's episodes different beginnings.
    """
    plays = [
        _begin(row, ids, sampling.n, make_environment, encode)
        for row, ids in zip(item["rows"], item["prompt_ids"], strict=True)
    ]
    prompts = [list(group[0].episode.prompt_ids) for group in plays]
    plays = [one for group in plays for one in group]
    keys = _row_keys(key, len(prompts), sampling.n)
    limit, turn = sampling.max_new_tokens, 0
    while under_way := [i for i, play in enumerate(plays) if not play.finish]:
        rooms = [limit - len(plays[i].episode.completion_ids) for i in under_way]
        config = dataclasses.replace(
            sampling, n=1, stop=(*sampling.stop, *plays[0].environment.stop)
        )
        out = generate(
            model,
            params,
            [[*plays[i].episode.prompt_ids, *plays[i].episode.completion_ids] for i in under_way],
            jax.vmap(lambda row_key: jax.random.fold_in(row_key, turn))(keys[np.array(under_way)]),  # noqa: B023
            config,
            decode=stop_decode or decode,
            limits=rooms,
        )
        for n, (i, room) in enumerate(zip(under_way, rooms, strict=True)):
            length = out.lengths[n]
            ids, logprobs = out.tokens[n, :length].tolist(), out.logprobs[n, :length].tolist()
            plays[i].take(ids, logprobs, out.finish_reasons[n], encode, decode, room)
        turn += 1
    rewards = [np.nan if p.episode.reward is None else p.episode.reward for p in plays]
    return item | {"prompt_ids": prompts}, _output(plays, limit), np.array(rewards, np.float64)


def _begin(row, prompt_ids, n: int, make_environment, encode) -> list[_EpisodeState]:
    """The episodes of one prompt."""
    group = []
    for _ in range(n):
        environment = make_environment()
        group.append(
            _EpisodeState(environment, Episode.start(environment, row, prompt_ids, encode), [])
        )
    if len({one.episode.prompt_ids for one in group}) > 1:
        raise ValueError(
            "an environment must show all episodes of a row the same beginning, and "
            f"{type(group[0].environment).__name__}.reset does not. Draw what differs in step."
        )
    return group


def _row_keys(key, prompts: int, n: int):
    key = jax.random.fold_in(key, TURNS)
    rows = np.arange(prompts * n)
    one = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))
    return one(rows // n, rows % n)


def _output(plays: list[_EpisodeState], limit: int) -> SampleOutput:
    """The episodes as if each were one completion; an answer past the limit is cut off."""
    lengths = np.array([min(len(p.episode.completion_ids), limit) for p in plays], np.int32)
    shape = (len(plays), int(lengths.max()))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (play, length) in enumerate(zip(plays, lengths, strict=True)):
        tokens[i, :length] = play.episode.completion_ids[:length]
        logprobs[i, :length] = play.logprobs[:length]
    mask = np.arange(shape[1])[None, :] < lengths[:, None]
    return SampleOutput(tokens, logprobs, mask, lengths, tuple(p.finish for p in plays))
