"""What a profile is, and the messages of a row."""

import abc
from collections.abc import Mapping
from typing import Any

from relax.data.formats import FormatOptions, conversation

Message = dict[str, Any]

# Columns that hold the messages of a row, whatever its format.
CONVERSATION = ("messages", "conversations", "prompt", "completion")
# Columns that hold what leads to an answer.
REASONING = ("steps", "reasoning")


class DataProfile(abc.ABC):
    """How examples become conversations, in training, in rollouts and in previews alike.

    Attributes:
      columns: columns beside those of a conversation that `prepare_messages` writes into the
        messages; whoever reads the messages does not get them a second time.
      instruction: what prompts ask for, if anything.
    """

    columns: tuple[str, ...] = REASONING
    instruction: str = ""

    @abc.abstractmethod
    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        """The conversation of an example, as `{"role": ..., "content": ...}` each.

        The last message is the answer, of the assistant, where the example has one. A prompt must
        become the same messages with an answer and without.
        """

    @abc.abstractmethod
    def get_stop_sequences(self) -> list[str]:
        """Texts that end a completion."""

    @abc.abstractmethod
    def format_system_prompt(self, base_prompt: str) -> str:
        """What the system message says, from what it said; "" is none."""


class Rewriting(DataProfile):
    """Base of profiles that ask for something in the first prompt and rewrite every answer."""

    system: str = ""  # what is added to a system prompt

    def rewrite(self, answer: str) -> str:
        """An answer in the form that `instruction` asks for; one that has it stays as it is."""
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
        """The base with a sentence more; nothing is added to nothing.

        There are templates without a system message, and prompts have the instruction anyhow.
        """
        if not base_prompt or not self.system or self.system in base_prompt:
            return base_prompt
        return f"{base_prompt}\n\n{self.system}"


def messages_of(example: Mapping[str, Any]) -> list[Message]:
    """The messages of an example of any format, copied.

    Formats are `messages`; `conversations` of `from` and `value`; `prompt` and `completion`, texts
    or messages. Where there are `steps`, a list, or `reasoning`, a text, the answer is that and,
    after an empty line, `completion` or else `answer`.

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
