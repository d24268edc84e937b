"""Turns of a conversation as tokens: what comes between two turns of a model, and what it has said.

A conversation is never rendered anew from text once the model has begun to write. The tokens of a
turn stay as they were sampled; only what follows it (the results of tools, the next user's message,
the header of the next turn) is rendered, and appended. It is the end of the whole conversation's
rendering: the part behind the token that ends the model's turn.
"""

import os.path
import re
from collections.abc import Sequence

from relax.data.limits import DEFAULT, Limits
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tool_calls import TOOL_FORMATS, ToolCall, Turn, parse_tool_calls
from relax.data.tool_calls import tool_format as format_of
from relax.errors import ConfigError, DataError

_MARKS = ("relaxA", "relaxB")  # two contents of a turn: what their renderings share comes behind it
_RESULT = "relaxR"
_ADVICE = "Give one that does with --chat_template_path."
_PROBE = ToolCall("", {"text": "a b", "number": 2})


class ChatTurns:
    """Renders and reads the turns of a model with its tokenizer's chat template.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      eos_token_ids: tokens that end a turn.
      tools: JSON schemas of tools, which the template must render.
      tool_format: name in `TOOL_FORMATS`, how the model writes calls; None: the one whose parser
        reads what the template writes.
      limits: on rendering.

    Raises:
      ConfigError: the template cannot render several turns, does not render tools or their results,
        or writes calls that no parser reads.
      DataError: there is no template.
    """

    def __init__(
        self,
        tokenizer,
        eos_token_ids: Sequence[int],
        tools: Sequence[dict] = (),
        *,
        tool_format: str | None = None,
        limits: Limits = DEFAULT,
    ):
        require_template(tokenizer, "tools and environments that answer messages")
        self.tokenizer, self.tools = tokenizer, list(tools)
        self.eos_token_ids = tuple(eos_token_ids)
        self._ends = [tokenizer.decode([i], skip_special_tokens=False) for i in eos_token_ids]
        self._renderer = ChatRenderer(tokenizer, limits)
        self.names = [schema["function"]["name"] for schema in self.tools]
        special = sorted(map(re.escape, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(special) or "(?!)")
        self._renders_calls = True
        # Channels are read without tools too.
        self._channels = "gpt_oss" if format_of(tokenizer.chat_template) == "gpt_oss" else None
        self.tool_format: str | None = None
        if self.tools:
            self.tool_format = self._checked_format(tool_format)
        try:
            self._has_end = {False: self._writes_end(False)}
        except DataError as error:
            raise ConfigError(
                f"the chat template cannot render several turns ({error}). {_ADVICE}"
            ) from error
        if self.tools:
            self._has_end[True] = self._checked_end()

    def prompt(self, messages: Sequence[dict], row: dict) -> list[int]:
        """The tokens of a conversation up to the header of the model's turn.

        Args:
          messages: the conversation.
          row: its `chat_template_kwargs` are passed to the template.

        Raises:
          DataError: the template refuses the conversation.
        """
        return self._encode(self._text(messages, row, True))

    def read(self, ids: Sequence[int]) -> Turn:
        """What the model has said in a turn, and its calls of tools.

        Args:
          ids: the turn's tokens, the one that ends it included.
        """
        ids = list(ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        turn = parse_tool_calls(text, self.tool_format or self._channels, self.tools)
        if not self.tools and (turn.calls or turn.errors):
            turn = Turn(text, [], [])
        plain = [self._special.sub("", part).strip() for part in (turn.content, turn.thoughts)]
        return turn._replace(content=plain[0], thoughts=plain[1])

    def between(
        self, messages: Sequence[dict], turn: Turn, new: Sequence[dict], last: int, row: dict
    ) -> list[int]:
        """The tokens between a turn of the model and its next one.

        Args:
          messages: the conversation before the turn.
          turn: what the model said.
          new: the messages that answer it, at least one.
          last: the turn's last token.
          row: as for `prompt`.

        Raises:
          DataError: the template refuses the conversation.
        """
        texts = [
            self._text([*messages, self._marked(turn, mark), *new], row, True) for mark in _MARKS
        ]
        after = _shared_end(*texts)
        has_ended = last in self.eos_token_ids
        if self._has_end[bool(turn.calls or turn.errors)]:
            place, end = min((after.index(end), end) for end in self._ends if end in after)
            after = after[place + len(end) :] if has_ended else after[place:]
        return self._encode_behind(last, after) if has_ended else self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_behind(self, last: int, text: str) -> list[int]:
        """The tokens of a text behind an end token, since some tokenizers mark a text's start."""
        end = self._ends[self.eos_token_ids.index(last)]
        ids = self._encode(end + text)
        return ids[1:] if ids and ids[0] == last else self._encode(text)

    def _text(self, messages: Sequence[dict], row: dict, prompt: bool, tools: bool = True) -> str:
        row = {"chat_template_kwargs": row.get("chat_template_kwargs")}
        if self.tools and tools:
            row["tools"] = self.tools
        messages = _accepted(messages) if self._channels else messages
        return self._renderer.texts([Job(list(messages), row, "an episode", prompt)])[0]

    def _writes_end(self, with_call: bool) -> bool:
        """Whether the template writes an end token between a turn of the model and its answer."""
        calls = [_PROBE._replace(name=self.names[0])] if with_call else []
        answer = tool_message(calls[0].name, _RESULT, 0) if calls else _user(_RESULT)
        turns = [self._marked(Turn("", calls, []), mark) for mark in _MARKS]
        after = _shared_end(*(self._text([_user(), turn, answer], {}, True) for turn in turns))
        return any(end in after.partition(_RESULT)[0] for end in self._ends)

    def _checked_format(self, name: str | None) -> str:
        """The format of the template's calls, once the template is known to render tools."""
        if name is not None and name not in TOOL_FORMATS:
            names = ", ".join(TOOL_FORMATS)
            raise ConfigError(f"tool_format must be one of {names}, got {name!r}.")
        call = _PROBE._replace(name=self.names[0])
        said, result = assistant_message(Turn("", [call], [])), tool_message(call.name, _RESULT, 0)
        try:
            before = self._text([_user()], {}, True)
            shows = before != self._text([_user()], {}, True, tools=False)
            whole = self._text([_user(), said], {}, False)
            shows_result = _RESULT in self._text([_user(), said, result], {}, True)
        except DataError as error:
            raise ConfigError(
                f"the chat template cannot render a call of a tool and its result ({error}). "
                f"{_ADVICE}"
            ) from error
        if not shows or not shows_result:
            what = "results of tools" if shows else "tools"
            raise ConfigError(f"the chat template does not render {what}. {_ADVICE}")
        turn = whole[len(os.path.commonprefix([before, whole])) :]
        self._renders_calls = call.name in turn
        for end in self._ends:
            turn = turn.partition(end)[0]
        found = [n for n in TOOL_FORMATS if parse_tool_calls(turn, n).calls == [call]]
        if name is None and not found:
            how = f"as {turn!r}, which no parser reads" if self._renders_calls else "not at all"
            raise ConfigError(
                f"the chat template renders calls of tools {how}. Name the format that the model "
                f"writes with --tool_format: {', '.join(TOOL_FORMATS)}; "
                "relax.data.tool_calls.register_tool_format adds one."
            )
        return name or found[0]

    def _checked_end(self) -> bool:
        if self._writes_end(True):
            return True
        raise ConfigError(
            f"the chat template ends a call of a tool by none of the end tokens "
            f"{', '.join(map(repr, self._ends))}. Name the token that does in "
            "generation_config.json, under eos_token_id."
        )

    def _marked(self, turn: Turn, mark: str) -> dict:
        """A turn whose last part is a mark; a malformed call stands as a call of that name."""
        calls = turn.calls or [ToolCall("unknown", {}) for _ in turn.errors[:1]]
        if not calls or not self._renders_calls:
            return {"role": "assistant", "content": mark}
        last = ToolCall(calls[-1].name, {"argument": mark})
        return assistant_message(Turn(turn.content, [*calls[:-1], last], []))


def _accepted(messages: Sequence[dict]) -> list[dict]:
    """Messages that gpt-oss' template does not refuse; what is read from it is behind them.

    It refuses thoughts beside content and a call, and a result that answers no call, as that of a
    malformed one.
    """
    found = []
    for message, after in zip(messages, [*messages[1:], {}], strict=True):
        if message["role"] == "assistant" and after.get("role") == "tool":
            message = {k: v for k, v in message.items() if k != "thinking"}
            unknown = assistant_message(Turn("", [ToolCall("unknown", {})], []))
            message.setdefault("tool_calls", unknown["tool_calls"])
        found.append(message)
    return found


def assistant_message(turn: Turn) -> dict:
    """A turn as a message of the assistant."""
    message: dict = {"role": "assistant", "content": turn.content}
    if turn.thoughts:
        message["thinking"] = turn.thoughts
    if turn.calls:
        message["tool_calls"] = [
            {
                "type": "function",
                "id": call_id(i),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(turn.calls)
        ]
    return message


def call_id(place: int) -> str:
    """The id of a turn's call; nine letters and digits, as some templates ask for.

    >>> call_id(0)
    'call00000'
    """
    return f"call{place:05d}"


def tool_message(name: str, content: str, place: int) -> dict:
    """The result of the call at a place in its turn."""
    return {"role": "tool", "name": name, "content": content, "tool_call_id": call_id(place)}


def _user(content: str = "Hello") -> dict:
    return {"role": "user", "content": content}


def _shared_end(a: str, b: str) -> str:
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]
