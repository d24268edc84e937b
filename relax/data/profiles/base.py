"""The base classes of profiles, and the messages of a row."""

import abc
from collections.abc import Mapping
from typing import Any

from relax.data.formats import FormatOptions, conversation

Message = dict[str, Any]

# Columns that hold the messages of a row, whatever its format.
CONVERSATION = ("messages", "conversations", "prompt", "completion")
# Columns that hold the reasoning before an answer.
REASONING = ("steps", "reasoning")


class DataProfile(abc.ABC):
    """Converts examples to conversations, for training, rollouts and previews alike.

    Attributes:
      columns: further columns that `prepare_messages` writes into the messages; they are removed
        from the row, so that they do not occur twice.
      instruction: the request that is added to prompts, if any.
    """

    columns: tuple[str, ...] = REASONING
    instruction: str = ""

    @abc.abstractmethod
    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        """The conversation of an example, as `{"role": ..., "content": ...}` each.

        If the example has an answer, it is the last message, by the assistant. The messages of the
        prompt must be the same with and without an answer.
        """

    @abc.abstractmethod
    def get_stop_sequences(self) -> list[str]:
        """Texts that end a completion."""

    @abc.abstractmethod
    def format_system_prompt(self, base_prompt: str) -> str:
        """The system message for the given one; "" means none."""


class Rewriting(DataProfile):
    """Base class of profiles that add a request to the first prompt and rewrite every answer."""

    system: str = ""  # sentence added to a system prompt

    def rewrite(self, answer: str) -> str:
        """The answer in the requested format; one that has it is unchanged."""
        return answer

    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        messages, asked = [], not self.instruction
        for message in messages_of(example):
            content = message.get("content")
            if isinstance(content, str) and message["role"] == "assistant":
                message["content"] = self.rewrite(content)
            elif isinstance(content, str) and message["role"] == "user" and not asked:
                asked = True
                if self.instruction not in content:
                    message["content"] = f"{content}\n\n{self.instruction}"
            messages.append(message)
        return messages

    def format_system_prompt(self, base_prompt: str) -> str:
        """Appends a sentence to the system prompt; an empty one stays empty.

        Some templates have no system message, and prompts contain the instruction anyway.
        """
        if not base_prompt or not self.system or self.system in base_prompt:
            return base_prompt
        return f"{base_prompt}\n\n{self.system}"


def messages_of(example: Mapping[str, Any]) -> list[Message]:
    """A copy of the messages of an example of any format.

    Formats are `messages`; `conversations` of `from` and `value`; `prompt` and `completion`, texts
    or messages. If there are `steps`, a list, or `reasoning`, a text, the answer is that followed
    by an empty line and `completion`, or else `answer`.

    Raises:
      ValueError: there are none of these columns.

    >>> messages_of({"prompt": "2+2?", "steps": ["Two and two.", "Add."], "answer": "4"})[1]
    {'role': 'assistant', 'content': 'Two and two.\\nAdd.\\n\\n4'}
    """
    for name in CONVERSATION[:2]:
        if example.get(name) is not None:
            return [dict(m) for m in conversation(dict(example), name, FormatOptions())]
    prompt = example.get("prompt")
    if prompt is None:
        raise ValueError(
            f"it needs 'messages', or 'prompt' and 'completion', and has {', '.join(example)}"
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answer = _answer(example)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return [dict(message) for message in (*prompt, *(answer or ()))]


def _answer(example: Mapping[str, Any]):
    """A text, messages, or None."""
    completion, steps = example.get("completion"), example.get("steps")
    if completion is not None and not isinstance(completion, str):
        return completion
    reasoning = example.get("reasoning") if steps is None else "\n".join(map(str, steps))
    last = example.get("answer") if completion is None else completion
    if not reasoning or last is None:
        return completion
    return f"{reasoning}\n\n{last}"
