"""Tools, calls and results as plain text, for templates without support for them."""

import json
from collections.abc import Mapping
from typing import Any

from relax.data.profiles.base import DataProfile, Message, messages_of

_HOW = (
    "You may call functions. A call is an object with the name and the arguments of a function, "
    "between <tool_call> and </tool_call>; its result comes back between <tool_response> and "
    "</tool_response>."
)


class ToolUseProfile(DataProfile):
    """Writes `tools` into the system message, calls and results as tagged JSON into the others.

    Results of calls become a user message; consecutive ones share one. So a conversation has only
    roles and texts, and any chat template renders it. If the model's own template renders `tools`,
    prefer the profile `chat`.

    >>> call = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    >>> row = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    >>> print(ToolUseProfile().prepare_messages(row)[0]["content"])
    <tool_call>
    {"name": "add", "arguments": {"a": 2, "b": 2}}
    </tool_call>
    """

    columns = (*DataProfile.columns, "tools")
    instruction = _HOW

    def prepare_messages(self, example: Mapping[str, Any]) -> list[Message]:
        out: list[Message] = []
        for message in messages_of(example):
            role, text = message["role"], _text(message)
            if role == "tool":
                role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
                if out and out[-1]["role"] == "user" and "</tool_response>" in out[-1]["content"]:
                    out[-1]["content"] += f"\n{text}"
                    continue
            out.append({"role": role, "content": text})
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not tools:
            return out
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        said = f"{_HOW} The functions are:\n<tools>\n{listed}\n</tools>"
        if out and out[0]["role"] in ("system", "developer"):
            out[0]["content"] += f"\n\n{said}"
            return out
        return [{"role": "system", "content": said}, *out]

    def get_stop_sequences(self) -> list[str]:
        return ["</tool_call>"]

    def format_system_prompt(self, base_prompt: str) -> str:
        return base_prompt  # the tools carry the instruction


def _text(message: Message) -> str:
    """The content, followed by the calls."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise ValueError(f"content must be a text, it is {content!r:.60}")
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        # In OpenAI's form they are JSON within JSON.
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        plain = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{plain}\n</tool_call>")
    return "\n".join([content] * bool(content) + calls)
