"""Rollouts of several turns: episodes share the slots of one generation.

Turns of different episodes are decoded side by side. While tools or environments work on an
episode's turn, it keeps its slot and its cache, and goes on from there: no token is computed twice,
and the prompt of a group is computed once.

When an answer is taken does not depend on the clock. Questions that were asked after a segment are
answered, at the latest, `LAG` segments later, where the loop waits for them; so a run that is
killed and resumed decodes the same tokens with the same programs. A turn's key depends only on the
numbers of its row and turn.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from relax.errors import DataError
from relax.rewards.episode_runner import Answer, EpisodeRunner
from relax.sampling import SampleOutput, SamplingConfig, Session
from relax.sampling.config import max_positions
from relax.sampling.rows import Row
from relax.trainers.rl.partners import Asked, Episode, Partner

# Folded into a rollout's key to separate the keys of turns from those of rows, and those from the
# seeds of environments. The values are arbitrary, but changing them would change recorded runs.
TURN_STREAM, SEED_STREAM = 104, 105
LAG = 1  # segments that are decoded while tools work


class EpisodeOutput(NamedTuple):
    """Episodes as completions.

    Attributes:
      prompt_ids: of each prompt, what `reset` returned included.
      output: one completion per episode, all turns and answers; `mask` is true on the tokens that
        the policy wrote.
      rewards: `[P * n]` float64, of the environment; NaN if there is none.
      episodes: `[P * n]`, with their messages and counts.
      counts: tokens `prefilled`, `appended` and `sampled`.
    """

    prompt_ids: list[list[int]]
    output: SampleOutput
    rewards: np.ndarray
    episodes: list[Episode]
    counts: dict[str, int]


class _Play:
    """The episodes under way.

    Args:
      session: the slots.
      partner: what answers.
      limit: maximum tokens of a completion, all turns and answers together.
      key_of: the key of a turn, from the numbers of episode and turn.
    """

    def __init__(
        self,
        session: Session,
        partner: Partner,
        limit: int,
        key_of: Callable[[int, int], jax.Array],
    ):
        self.session, self.partner, self.limit, self.key_of = session, partner, limit, key_of
        self.of_row: dict[Row, tuple[int, Episode]] = {}
        self.asked: list[tuple[int, Row, Asked]] = []  # with the segment before it
        self.segment = 0

    def run(self, episodes: list[Episode]) -> None:
        for i, episode in enumerate(episodes):
            if not episode.finish:
                row = self.session.open(episode.prompt_ids, self.key_of(i, 0), limit=self.limit)
                self.of_row[row] = (i, episode)
        while self.asked or self.session.under_way():
            self._collect()
            ended = [row for row, _ in self.session.advance() if row.reason is not None]
            self.segment += 1
            for row in ended:
                self._end_turn(row)

    def _collect(self) -> None:
        """Takes the answers that are due, and the oldest ones if nothing else can be done."""
        due = self.segment - LAG if self.session.under_way() else self.asked[0][0]
        taken = [one for one in self.asked if one[0] <= due]
        self.asked = self.asked[len(taken) :]
        given = _answers(self.partner.runner, [asked for _, _, asked in taken])
        for (_, row, asked), answers in zip(taken, given, strict=True):
            self._continue(row, asked.collect(answers))

    def _end_turn(self, row: Row) -> None:
        _, episode = self.of_row[row]
        episode.add_turn(row.tokens, row.logprobs)
        if row.reason == "length":  # truncated within a turn: there is no answer
            episode.finish = "length"
            asked = self.partner.end(episode)
        else:
            asked = self.partner.answer(episode, row.tokens, row.reason or "")
        if asked.numbers or not episode.finish:
            self.asked.append((self.segment, row, asked))
        else:
            self._close(row)

    def _continue(self, row: Row, ids: list[int] | None) -> None:
        i, episode = self.of_row[row]
        if ids is not None:
            episode.add_answer(ids)
            room = self.limit - len(episode.ids)
            if room > 0:
                self.session.extend(row, ids, self.key_of(i, episode.turns), limit=room)
                return
            episode.finish = "length"
            last = self.partner.end(episode)
            if last.numbers:
                self.asked.append((self.segment, row, last))
                return
        self._close(row)

    def _close(self, row: Row) -> None:
        self.session.close(row)
        self.partner.runner.end(self.of_row[row][1].number)


def rollout_episodes(
    model,
    params,
    item: dict,
    key: jax.Array,
    sampling: SamplingConfig,
    partner: Partner,
    decode: Callable,
    *,
    make_session: Callable[..., Session] = Session,
) -> EpisodeOutput:
    """Rolls out `sampling.n` episodes of every prompt of an item.

    Args:
      model, params: the policy; `params` are all parameters.
      item: `prompt_ids` and `rows` of P prompts.
      key: the rollout's key.
      sampling: its `max_new_tokens` limits all turns and answers of an episode together.
      partner: what answers the model.
      decode: turns ids into the text that is searched for stop strings.
      make_session: makes the slots.

    Raises:
      DataError: `reset` returned different texts for the same prompt.
    """
    n, rows = sampling.n, len(item["rows"])
    seeds, keys = _seeds(key, rows * n), _row_keys(key, rows, n)
    first = partner.runner.reserve(rows * n)
    episodes = [
        Episode(first + i, item["rows"][i // n], list(item["prompt_ids"][i // n]), int(seeds[i]))
        for i in range(rows * n)
    ]
    begun = [partner.begin(episode) for episode in episodes]
    for asked, answers in zip(begun, _answers(partner.runner, begun), strict=True):
        asked.collect(answers)
    room = max_positions(model.config)[0] - sampling.max_new_tokens
    for i, episode in enumerate(episodes):
        _check_length(episode, item["prompt_ids"][i // n], room, partner)
    for group in (episodes[i * n : (i + 1) * n] for i in range(rows)):
        _check_same_beginning(group, partner)
    stop = tuple(dict.fromkeys((*sampling.stop, *partner.stop)))
    config = dataclasses.replace(sampling, n=1, stop=stop)
    slots = min(sampling.slots, len(episodes))
    session = make_session(model, params, config, slots=slots, decode=decode)
    play = _Play(
        session,
        partner,
        sampling.max_new_tokens,
        lambda i, turn: _turn_key(keys, i, turn),
    )
    play.run(episodes)
    rewards = [np.nan if e.reward is None else e.reward for e in episodes]
    prompts = [list(episodes[i * n].prompt_ids) for i in range(rows)]
    output = _output(episodes, sampling.max_new_tokens)
    return EpisodeOutput(
        prompts, output, np.array(rewards, np.float64), episodes, dict(session.counts)
    )


@jax.jit
def _turn_key(keys: jax.Array, i: int, turn: int) -> jax.Array:
    """The key of a turn; compiled, since one call of the device is faster than several."""
    return jax.random.fold_in(keys[i], turn)


def _answers(runner: EpisodeRunner, asked: list[Asked]) -> list[list[Answer]]:
    """The answers to each episode's questions."""
    answers = iter(runner.wait([number for one in asked for number in one.numbers]))
    return [[next(answers) for _ in one.numbers] for one in asked]


def _check_length(episode: Episode, prompt: list[int], room: int, partner: Partner) -> None:
    """Loses an episode whose environment has shown more than fits into the model's positions."""
    count = len(episode.prompt_ids)
    if count > room and not episode.finish:
        episode.lose(
            f"reset made a prompt of {count} tokens, and with max_completion_length there is room "
            f"for {room} in the model's positions"
        )
        episode.prompt_ids = list(prompt)
        partner.runner.end(episode.number)


def _check_same_beginning(group: list[Episode], partner: Partner) -> None:
    starts = {tuple(episode.prompt_ids) for episode in group if not episode.finish}
    if len(starts) > 1:
        raise DataError(
            "an environment must start all episodes of a row with the same messages, but "
            f"{partner.runner.info.name}.reset does not. Make random choices in step."
        )
    for episode in group:
        if episode.finish:  # its reset failed: the group's prompt, and a token that is masked
            episode.prompt_ids = list(next(iter(starts), tuple(episode.prompt_ids)))
            episode.add_answer(episode.prompt_ids[-1:])


def _seeds(key: jax.Array, count: int) -> np.ndarray:
    return np.asarray(jax.random.bits(jax.random.fold_in(key, SEED_STREAM), (count,)))


def _row_keys(key: jax.Array, prompts: int, n: int) -> jax.Array:
    key = jax.random.fold_in(key, TURN_STREAM)
    rows = np.arange(prompts * n)
    one = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))
    return one(rows // n, rows % n)


def _output(episodes: list[Episode], limit: int) -> SampleOutput:
    """The episodes as one completion each; an answer beyond the limit is truncated."""
    lengths = np.array([min(len(e.ids), limit) for e in episodes], np.int32)
    shape = (len(episodes), max(1, int(lengths.max())))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask = np.zeros(shape, bool)
    for i, (episode, length) in enumerate(zip(episodes, lengths, strict=True)):
        tokens[i, :length] = episode.ids[:length]
        logprobs[i, :length] = episode.logprobs[:length]
        mask[i, :length] = episode.sampled[:length]
    return SampleOutput(tokens, logprobs, mask, lengths, tuple(e.finish for e in episodes))
