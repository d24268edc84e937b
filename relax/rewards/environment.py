"""Conversations of several turns: what answers the model, and the record of who wrote which token.

    episode = Episode.start(environment, row, prompt_ids, encode)
    while not episode.done:
        ids = ...  # sampled behind episode.prompt_ids + episode.completion_ids
        episode = episode.turn(ids, environment, encode, decode)

Tokens are appended and never made again from text: what the model sampled is what it is trained
on, and what it was shown is masked out of the loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Observation:
    """How an environment answers a turn.

    Attributes:
      text: what the model sees next; None: nothing.
      done: the conversation is over.
      reward: for this turn; None: none is given.
    """

    text: str | None
    done: bool
    reward: float | None = None


class Environment(Protocol):
    """What the model talks to. One object serves one conversation at a time.

    `stop` are the texts at which a turn ends, behind which the environment speaks.
    """

    stop: tuple[str, ...]

    def reset(self, row: Mapping) -> str | None:
        """Begins the conversation of a row; returns what is shown behind the prompt, or None."""

    def step(self, text: str) -> Observation:
        """Answers the turn that the model has written."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One conversation so far.

    Attributes:
      prompt_ids: of the prompt and of what `reset` returned.
      completion_ids: of all turns and observations, in their order.
      sampled: one for each of `completion_ids`: True where the model wrote it, the loss mask.
      reward: the sum of those given; None: none was.
      done: the environment has ended it.
      turns: that the model has taken.
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
          encode: turns text into token ids, without adding special tokens.
        """
        shown = environment.reset(row)
        return cls((*prompt_ids, *(encode(shown) if shown else ())))

    def turn(
        self, ids: list[int], environment: Environment, encode: Encode, decode: Decode
    ) -> "Episode":
        """The episode after a turn of the model and the answer to it.

        Args:
          ids: sampled behind the prompt and completion so far, the end token included.
          decode: turns token ids into text, without special tokens.

        Raises:
          ValueError: the episode is over, or the turn is empty.
        """
        if self.done or not ids:
            state = "is over" if self.done else "goes on"
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
