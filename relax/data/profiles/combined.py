"""Combinations of profiles."""

from collections.abc import Mapping, Sequence
from typing import Any

from relax.data.profiles.base import CONVERSATION, REASONING, DataProfile, Message
from relax.errors import ConfigError


class CombinedProfile(DataProfile):
    """A combination such as `emoji_think+regime3`: each profile is applied to the previous result.

    Args:
      profiles: profiles by name, in order.

    Raises:
      ConfigError: a stop sequence of one occurs in the format of another.
    """

    def __init__(self, profiles: Mapping[str, DataProfile]):
        self.profiles: Sequence[DataProfile] = tuple(profiles.values())
        for name, profile in profiles.items():
            for other, asking in profiles.items():
                for stop in profile.get_stop_sequences():
                    if other != name and stop.strip() and stop in asking.instruction:
                        raise ConfigError(
                            f"profiles {name} and {other} cannot be combined: {stop!r} ends the "
                            f"completions of {name}, and {other} writes it. Use one of them."
                        )
        self.columns = tuple(dict.fromkeys(c for p in self.profiles for c in p.columns))
        self.instruction = "\n\n".join(p.instruction for p in self.profiles if p.instruction)

    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        first, *others = self.profiles
        messages = first.prepare_messages(example)
        rest = {n: v for n, v in example.items() if n not in (*CONVERSATION, *REASONING)}
        for profile in others:
            # A column that one profile has written into the messages is not written again.
            rest = {n: v for n, v in rest.items() if n not in first.columns}
            messages = profile.prepare_messages(rest | {"messages": messages})
            first = profile
        return messages

    def get_stop_sequences(self) -> list[str]:
        return list(dict.fromkeys(s for p in self.profiles for s in p.get_stop_sequences()))

    def format_system_prompt(self, base_prompt: str) -> str:
        for profile in self.profiles:
            base_prompt = profile.format_system_prompt(base_prompt)
        return base_prompt
