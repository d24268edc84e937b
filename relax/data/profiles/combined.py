"""Several profiles, one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

from relax.data.profiles.base import CONVERSATION, REASONING, DataProfile, Message
from relax.errors import ConfigError


class CombinedProfile(DataProfile):
    """What `emoji_think+regime3` stands for: each profile works on what the one before it made.

    Args:
      profiles: by name, in their order.

    Raises:
      ConfigError: what ends the answers of one is what another asks for.
    """

    def __init__(self, profiles: Mapping[str, DataProfile]):
        self.profiles: Sequence[DataProfile] = tuple(profiles.values())
        for name, profile in profiles.items():
            for other, asking in profiles.items():
                for stop in profile.get_stop_sequences():
                    if other != name and stop.strip() and stop in asking.instruction:
                        raise ConfigError(
                            f"profiles {name} and {other} cannot be combined: {stop!r} ends the "
                            f"completions of {name}, and {other} asks for it. Take one of them."
                        )
        self.columns = tuple(dict.fromkeys(c for p in self.profiles for c in p.columns))
        self.instruction = "\n\n".join(p.instruction for p in self.profiles if p.instruction)

    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        first, *others = self.profiles
        messages = first.prepare_messages(example)
        rest = {n: v for n, v in example.items() if n not in (*CONVERSATION, *REASONING)}
        for profile in others:
            # What one has written into the messages, the next does not write again.
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
