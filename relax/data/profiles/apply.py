"""Applies profiles to rows of any format."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from relax.data.preference_encode import split_prompt
from relax.data.profiles.base import CONVERSATION, DataProfile, Message
from relax.data.profiles.chat import ChatProfile
from relax.data.reading import Rows
from relax.errors import DataError

Kind = Literal["completions", "preferences", "prompts"]
_ANSWERS = ("chosen", "rejected")
_SYSTEM = ("system", "developer")


def apply_profile(
    profile: DataProfile, rows: Rows, kind: Kind, system_prompt: str | None = None
) -> Rows:
    """Converts rows to messages with a profile; the profile `chat` leaves rows unchanged.

    Args:
      profile: result of `load_profile`.
      rows: rows of any format but tokens and plain texts.
      kind: use of the rows: `completions` for SFT, `preferences` (pairs or labelled completions),
        or `prompts` for reinforcement learning.
      system_prompt: for rows without a system message; ignored by `chat`, see
        `remaining_system_prompt`.

    Returns:
      Rows with `messages`, with `prompt` and `completion`, with `prompt`, `chosen` and `rejected`,
      or with `prompt`; all are lists of messages, and other columns are kept.

    Raises:
      DataError: the profile cannot read a row; with its place.
    """
    if type(profile) is ChatProfile:
        return rows
    make = _PairEncoder(profile, system_prompt)
    transform = {
        "completions": make.completion,
        "preferences": make.preference,
        "prompts": make.prompt,
    }[kind]
    made = []
    for i, row in enumerate(rows.rows):
        try:
            made.append(transform(row))
        except DataError as error:
            raise DataError(f"{rows.origin(i)}: {error}") from error
        except Exception as error:  # a profile may be the user's code
            raise DataError(
                f"{rows.origin(i)}: the profile {type(profile).__name__} cannot read the row: "
                f"{type(error).__name__}: {error}."
            ) from error
    return dataclasses.replace(rows, rows=made, key=None)


def remaining_system_prompt(profile: DataProfile, system_prompt: str | None) -> str | None:
    """The system prompt that `apply_profile` has not applied: all of it with `chat`, else None."""
    return system_prompt if type(profile) is ChatProfile else None


def early_stops(rows: Sequence[Mapping[str, Any]], stops: Sequence[str]) -> dict[str, int]:
    """Counts answers with a stop sequence before their end, where sampled ones would end.

    >>> row = {"completion": [{"role": "assistant", "content": "4\\n\\nAnswer: 4"}]}
    >>> early_stops([row], ["\\n\\n", "<think>"])
    {'\\n\\n': 1}
    """
    if not stops:
        return {}
    texts = []
    for row in rows:
        messages = row.get("completion") or row.get("messages") or row.get("chosen") or ()
        last = messages[-1] if isinstance(messages, list) and messages else {}
        last = last if isinstance(last, Mapping) else {}  # rows are checked when they are encoded
        texts.append(last.get("content") if last.get("role") == "assistant" else None)
    counts = {
        stop: sum(isinstance(t, str) and 0 <= t.find(stop) < len(t) - len(stop) for t in texts)
        for stop in stops
    }
    return {stop: count for stop, count in counts.items() if count}


class _PairEncoder:
    """Converts rows of one kind."""

    def __init__(self, profile: DataProfile, system_prompt: str | None):
        self.profile, self.system_prompt = profile, system_prompt

    def completion(self, row: dict) -> dict:
        if row.get("messages") is not None or row.get("conversations") is not None:
            return self._others(row) | {"messages": self._messages(row)}
        if row.get("completion") is not None:
            prompt, answer = self._split(row, row["completion"])
        else:
            messages = self._messages(row)
            if messages[-1]["role"] != "assistant":
                raise DataError(
                    f"the profile {type(self.profile).__name__} makes no answer of the row: it "
                    f"needs a 'completion', and the row has {', '.join(row)}."
                )
            prompt, answer = messages[:-1], messages[-1:]
        return self._others(row) | {"prompt": prompt, "completion": answer}

    def preference(self, row: dict) -> dict:
        if row.get("completion") is not None and row.get("chosen") is None:
            return self.completion(row)
        if row.get("prompt") is None:
            split = split_prompt(row["chosen"], row["rejected"])
            # A space before the answer belongs to plain texts, not to messages.
            row = row | {n: v.strip() if isinstance(v, str) else v for n, v in split.items()}
        prompts, answers = zip(*(self._split(row, row[name]) for name in _ANSWERS), strict=True)
        if prompts[0] != prompts[1]:
            raise DataError(
                f"the profile {type(self.profile).__name__} makes another prompt for the chosen "
                "answer than for the rejected one: a prompt must not depend on the answer."
            )
        return (
            self._others(row) | {"prompt": prompts[0]} | dict(zip(_ANSWERS, answers, strict=True))
        )

    def prompt(self, row: dict) -> dict:
        messages = self._messages({n: v for n, v in row.items() if n != "completion"})
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError(
                f"the profile {type(self.profile).__name__} makes no prompt of the row."
            )
        kept = {n: v for n, v in row.items() if n not in self.profile.columns}
        return kept | {"prompt": messages}

    def _split(self, row: dict, answer) -> tuple[list[Message], list[Message]]:
        """Splits messages into those of the prompt and those of the answer."""
        bare = {n: v for n, v in row.items() if n not in (*_ANSWERS, "completion", "answer")}
        without = {n: v for n, v in bare.items() if n not in self.profile.columns}
        tools = {n: v for n, v in bare.items() if n == "tools"}
        prompt = self._messages(without | tools)
        whole = self._messages(bare | {"completion": answer})
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise DataError(
                f"the profile {type(self.profile).__name__} makes another prompt where there is an "
                "answer than where there is none: a prompt must not depend on the answer."
            )
        return prompt, whole[len(prompt) :]

    def _messages(self, example: dict) -> list[Message]:
        messages = [dict(message) for message in self.profile.prepare_messages(example)]
        has_system = bool(messages) and messages[0]["role"] in _SYSTEM
        if _has_system(example) or not self.system_prompt:
            base = messages[0]["content"] if has_system else ""
            added = ""
        else:
            base, added = self.system_prompt, messages[0]["content"] if has_system else ""
        text = self.profile.format_system_prompt(base).strip()
        text = "\n\n".join(part for part in (text, added) if part)
        rest = messages[1:] if has_system else messages
        return [{"role": "system", "content": text}, *rest] if text else rest

    def _others(self, row: dict) -> dict:
        taken = (*CONVERSATION, *_ANSWERS, *self.profile.columns)
        return {name: value for name, value in row.items() if name not in taken}


def _has_system(row: Mapping[str, Any]) -> bool:
    """Whether the data has a system message of its own."""
    for name in ("messages", "prompt", "conversations"):
        messages = row.get(name)
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            return messages[0].get("role", messages[0].get("from")) in _SYSTEM
    return False
