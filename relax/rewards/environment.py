"""Environments: what answers the model in an episode of several turns.

Most environments answer messages, which the model's chat template renders. One that answers texts
needs no template. An object serves one episode at a time, in a process of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Messages = Mapping | Sequence[Mapping] | str | None  # a text is a message of the user


class Environment(Protocol):
    """An environment that answers messages."""

    def reset(self, row: Mapping) -> Messages:
        """Begins the episode of a row; returns messages to show after its prompt."""

    def step(self, message: Mapping) -> tuple[Messages, float | None, bool]:
        """Answers a turn of the model.

        Args:
          message: `{"role": "assistant", "content": ...}`.

        Returns:
          messages: what the model reads next.
          reward: the reward of this turn; None: none. An episode's reward is their sum.
          done: the episode is over.
        """


@dataclass(frozen=True)
class Observation:
    """A text environment's answer to a turn.

    Attributes:
      text: text that the model sees next; None: none.
      done: the conversation is over.
      reward: reward of this turn; None: none.
    """

    text: str | None
    done: bool
    reward: float | None = None


class TextEnvironment(Protocol):
    """An environment that answers texts, within one turn of a chat template or without any.

    `stop` are the texts that end a turn of the model.
    """

    stop: tuple[str, ...]

    def reset(self, row: Mapping) -> str | None:
        """Begins the conversation of a row; returns text to show after the prompt, or None."""

    def step(self, text: str) -> Observation:
        """Answers a turn of the model."""
