"""Thoughts of the assistant: kept, or stripped from a conversation before it is rendered."""

import re

THINKING = ("keep", "strip", "last_only")
# The columns of a message that hold its thoughts; transformers gives templates all of them.
REASONING = ("reasoning_content", "reasoning", "thinking")
_PAIR = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_REST = re.compile(r"\A.*</think>\s*", re.DOTALL)  # the prompt has opened the thought


def with_thinking(messages: list[dict], thinking: str) -> list[dict]:
    """The messages with the thoughts that a run trains on; a message without change is the same.

    Args:
      messages: messages whose content is text.
      thinking: `keep`: as they are; `strip`: none; `last_only`: those behind the last message of
        the user.

    >>> row = [{"role": "assistant", "content": "<think>Sum</think>5"}]
    >>> with_thinking(row, "strip")
    [{'role': 'assistant', 'content': '5'}]
    """
    if thinking == "keep":
        return messages
    last = len(messages)
    if thinking == "last_only":
        users = (i for i, message in enumerate(messages) if message.get("role") == "user")
        last = max(users, default=-1)
    return [_stripped(message) if i < last else message for i, message in enumerate(messages)]


def thoughts_of(message: dict) -> list[str]:
    """The texts of a message's thoughts."""
    found = [message[name] for name in REASONING if isinstance(message.get(name), str)]
    content = message.get("content")
    if isinstance(content, str) and "</think>" in content:
        found.append(content.rpartition("</think>")[0].rpartition("<think>")[2])
    return [text.strip() for text in found if text.strip()]


def _stripped(message: dict) -> dict:
    if message.get("role") != "assistant" or not thoughts_of(message):
        return message
    kept = {name: value for name, value in message.items() if name not in REASONING}
    if isinstance(kept.get("content"), str):
        kept["content"] = _REST.sub("", _PAIR.sub("", kept["content"]))
    return kept
