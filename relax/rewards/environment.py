"""Conversations of several turns: environments, and episodes that record who wrote which token.

    episode = Episode.start(environment, row, prompt_ids, encode)
    while not episode.done:
        ids = ...  # sampled after episode.prompt_ids + episode.completion_ids
        episode = episode.turn(ids, environment, encode, decode)

Tokens are appended and never tokenised again: the model is trained on exactly the tokens that it
sampled, and observations are masked out of the loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn.

    Attributes:
      text: text that the model sees next; None: none.
      done: the conversation is over.
      reward: reward of this turn; None: none.
    """

    text: str | None
    done: bool
    reward: float | None = None


class Environment(Protocol):
    """The counterpart of the model in a conversation. An object serves one conversation at a time.

    `stop` are the texts that end a turn of the model.
    """

    stop: tuple[str, ...]

    def reset(self, row: Mapping) -> str | None:
        """Begins the conversation of a row; returns text to show after the prompt, or None."""

    def step(self, text: str) -> Observation:
        """Answers a turn of the model."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """A conversation so far.

    Attributes:
      prompt_ids: token ids of the prompt and of the text that `reset` returned.
      completion_ids: token ids of all turns and observations, in order.
      sampled: for each of `completion_ids`, whether the model wrote it: the loss mask.
      reward: sum of the rewards; None: none was given.
      done: whether the environment has ended the conversation.
      turns: number of turns of the model.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] = ()
    sampled: tuple[bool, ...] = ()
    reward: float | None = None
    done: bool = False
    turns: int = 0

    @classmethod
    def start(
        cls, environment: Environment, row: Mapping, prompt_ids: list[int], encode: Encode
    ) -> "Episode":
        """Resets the environment to a row.

        Args:
          encode: converts text to token ids, without adding special tokens.
        """
        shown = environment.reset(row)
        return cls((*prompt_ids, *(encode(shown) if shown else ())))

    def turn(
        self, ids: list[int], environment: Environment, encode: Encode, decode: Decode
    ) -> "Episode":
        """The episode after a turn of the model and the environment's answer.

        Args:
          ids: token ids sampled after the prompt and completion so far, including the end token.
          decode: converts token ids to text, without special tokens.

        Raises:
          ValueError: the episode is over, or the turn is empty.
        """
        if self.done or not ids:
            state = "is over" if self.done else "is not over"
            raise ValueError(
                f"a turn needs tokens and an episode that is not over, got {len(ids)} tokens and "
                f"an episode that {state}. Sample only where `done` is False."
            )
        observation = environment.step(decode(list(ids)))
        shown = encode(observation.text) if observation.text and not observation.done else []
        reward = self.reward
        if observation.reward is not None:
            reward = (reward or 0.0) + observation.reward
        return dataclasses.replace(
            self,
            completion_ids=(*self.completion_ids, *ids, *shown),
            sampled=(*self.sampled, *[True] * len(ids), *[False] * len(shown)),
            reward=reward,
            done=observation.done,
            turns=self.turns + 1,
        )
