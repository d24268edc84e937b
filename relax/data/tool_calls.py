"""Tool calls in the text of a model: one small parser per format, chosen by the chat template.

A parser splits a turn, decoded with special tokens and without its end token, into the text beside
the calls, the calls, and what is wrong with calls that cannot be read. Nothing is evaluated.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from relax.data.call_text import (
    ToolCall,
    checked,
    json_call,
    json_calls,
    json_decoder,
    key_value_call,
    named_call,
    python_calls,
    tagged_call,
    whole,
)


class Turn(NamedTuple):
    """A turn of the model.

    Attributes:
      content: the text beside the calls.
      calls: the calls, in their order.
      errors: for each call that cannot be read, a sentence that says why, for the model.
      thoughts: the text of channels for thoughts.
    """

    content: str
    calls: list[ToolCall]
    errors: list[str]
    thoughts: str = ""


class Hidden(NamedTuple):
    """Text of a turn that is no content: thoughts, or the marks of a channel."""

    thoughts: str = ""


# Start, end, and the call, or what is wrong with it, or what is no content.
Found = Iterator[tuple[int, int, ToolCall | str | Hidden]]
Parser = Callable[[str, Sequence[dict]], Found]


class ToolFormat(NamedTuple):
    """A format of tool calls.

    Attributes:
      marks: texts in a chat template of which any one shows that it writes this format.
      begins: text with which calls begin, for streaming: text before it is certainly content.
        "{" stands for turns that are JSON as a whole.
      parse: yields the place of each call in a text, and the call, or a sentence if it is broken;
        and of what is no content. An exception of it counts as a call that is broken.
    """

    marks: tuple[str, ...]
    begins: str
    parse: Parser


TOOL_FORMATS: dict[str, ToolFormat] = {}  # those with the more specific marks first


def register_tool_format(name: str, *marks: str, begins: str) -> Callable[[Parser], Parser]:
    """Registers a parser under a name; the arguments are those of `ToolFormat`."""

    def register(parse: Parser) -> Parser:
        TOOL_FORMATS[name] = ToolFormat(marks, begins, parse)
        return parse

    return register


def tool_format(chat_template: str | None) -> str | None:
    """The name of the format that a chat template writes; None: it writes none that is known.

    >>> tool_format("{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}")
    'hermes'
    """
    template = chat_template or ""
    names = (n for n, f in TOOL_FORMATS.items() if any(mark in template for mark in f.marks))
    return next(names, None)


def parse_tool_calls(text: str, name: str | None, tools: Sequence[dict] = ()) -> Turn:
    """Splits a turn of the model into content, calls and errors.

    Args:
      text: the turn with special tokens, without its end token.
      name: a name in `TOOL_FORMATS`; None: all of the text is content.
      tools: schemas of the tools, which some formats need for the types of arguments.

    >>> parse_tool_calls('Hm. <tool_call>{"name": "f", "arguments": {}}</tool_call>', "hermes")
    Turn(content='Hm.', calls=[ToolCall(name='f', arguments={})], errors=[], thoughts='')
    """
    if name is None:
        return Turn(text, [], [])
    calls, errors, thoughts, content, last = [], [], [], [], 0
    for start, end, found in _guarded(TOOL_FORMATS[name].parse, text, tools):
        content.append(text[last:start])
        last = end
        if isinstance(found, ToolCall):
            calls.append(found)
        elif isinstance(found, Hidden):
            thoughts.append(found.thoughts.strip())
        else:
            errors.append(whole(found))
    if not content:
        return Turn(text, [], [])
    beside = "".join([*content, text[last:]]).strip()
    return Turn(beside, calls, errors, "\n".join(filter(None, thoughts)))


def _guarded(parse: Parser, text: str, tools: Sequence[dict]) -> Found:
    """What a parser finds, its calls checked; an exception stands for a call in the rest."""
    last = 0
    try:
        for start, end, found in parse(text, tools):
            yield start, end, checked(found) if isinstance(found, ToolCall) else found
            last = end
    except Exception as error:  # of any parser: what a model writes must not end a run
        reason = f"{type(error).__name__}: {error}"[:200]
        yield last, len(text), f"a tool call cannot be read: {reason}."


def _between(text: str, begin: str, end: str | None) -> Iterator[tuple[int, int, str]]:
    """The places and contents of what stands between two marks; the last end may be missing."""
    ends = "\\Z" if end is None else f"(?:{re.escape(end)}|\\Z)"
    for match in re.finditer(f"{re.escape(begin)}(.*?){ends}", text, re.DOTALL):
        yield match.start(), match.end(), match.group(1)


def _spread(start: int, end: int, calls: Sequence[ToolCall | str]) -> Found:
    for i, call in enumerate(calls):
        yield (start, end, call) if i == 0 else (end, end, call)


@register_tool_format(
    "lfm2", "<|tool_call_start|>", "<|tool_list_start|>", begins="<|tool_call_start|>"
)
def _lfm2(text: str, tools: Sequence[dict]) -> Found:
    """A list of Python calls with literal keyword arguments."""
    for start, end, inner in _between(text, "<|tool_call_start|>", "<|tool_call_end|>"):
        stripped = inner.strip()
        json_like = stripped.startswith(("{", "[{"))
        yield from _spread(start, end, (json_calls if json_like else python_calls)(stripped))


def _braces(text: str, begin: str, end: str, quote: str) -> Found:
    """Calls like `call:name{key:value}` with texts within `quote`."""
    for start, stop, inner in _between(text, begin, end):
        match = re.fullmatch(r"\s*call:([\w.\-]+)(\{.*\})\s*", inner, re.DOTALL)
        if match is None:
            yield start, stop, f"a tool call must be call:name{{key:value}}, got {inner[:200]!r}."
            continue
        # As JSON: texts are quoted, and keys, which have no quotes, are outside of texts.
        pieces = match.group(2).split(quote)
        outside = [re.sub(r"([{,]\s*)([\w.\-]+)\s*:", r'\1"\2":', piece) for piece in pieces[::2]]
        inside = [json.dumps(piece) for piece in pieces[1::2]]
        made = "".join(o + i for o, i in zip(outside, [*inside, ""], strict=False))
        try:
            yield start, stop, ToolCall(match.group(1), json_decoder().decode(made))
        except (ValueError, RecursionError) as error:
            yield start, stop, f"the arguments of {match.group(1)} cannot be read: {error}."


@register_tool_format("gemma", "<start_function_call>", begins="<start_function_call>")
def _gemma(text: str, tools: Sequence[dict]) -> Found:
    yield from _braces(text, "<start_function_call>", "<end_function_call>", "<escape>")


@register_tool_format("gemma4", "<|tool_call>", begins="<|tool_call>")
def _gemma4(text: str, tools: Sequence[dict]) -> Found:
    yield from _braces(text, "<|tool_call>", "<tool_call|>", '<|"|>')


# A message of gpt-oss from its channel on. The recipient comes before the channel or behind it:
# models write both, and templates the former. Nothing is tried twice, so the time is linear.
_MESSAGE = re.compile(
    r"<\|channel\|>(\w+?(?=to=)|\w++)(?:\s*+to=([\w.\-]++))?+\s*+"
    r"(?:<\|constrain\|>\s*+\w++|\w++)?+\s*+<\|message\|>"
    r"(.*?)(?:<\|call\|>|<\|end\|>|<\|return\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)


@register_tool_format("gpt_oss", "<|channel|>", begins="<|channel|>commentary to=")
def _gpt_oss(text: str, tools: Sequence[dict]) -> Found:
    """Messages in channels: thoughts in `analysis`, calls by a recipient, and content."""
    last = 0
    for match in _MESSAGE.finditer(text):
        channel, after, said = match.groups()
        start, before = _header(text, last, match.start())
        last = match.end()
        name = (before or after or "").removeprefix("functions.")
        if name:
            yield start, last, named_call(name, said or "{}")
        elif channel == "analysis":
            yield start, last, Hidden(said)
        else:
            yield start, match.start(3), Hidden()
            yield match.end(3), last, Hidden()


def _header(text: str, first: int, channel: int) -> tuple[int, str | None]:
    """Where the header of a message begins before its channel, and the recipient there."""
    head = text[first:channel].rstrip()
    match = re.search(r"to=([\w.\-]+)\Z", head)
    if match is not None:
        head = head[: match.start()].rstrip()
    start = first + len(head.removesuffix("<|start|>assistant"))
    return start, match and match.group(1)


@register_tool_format("mistral", "[TOOL_CALLS]", begins="[TOOL_CALLS]")
def _mistral(text: str, tools: Sequence[dict]) -> Found:
    """A JSON list of calls, or name[ARGS]{...} for each."""
    for start, end, inner in _between(text, "[TOOL_CALLS]", None):
        calls: list[ToolCall | str] = []
        for part in inner.split("[TOOL_CALLS]"):
            name, arguments_mark, arguments = part.partition("[ARGS]")
            if arguments_mark:
                calls.append(named_call(name.partition("[CALL_ID]")[0].strip(), arguments))
            elif part.strip():
                calls += json_calls(part)
        yield from _spread(start, end, calls or json_calls(inner))


@register_tool_format("hermes", "<tool_call>", begins="<tool_call>")
def _hermes(text: str, tools: Sequence[dict]) -> Found:
    """JSON within tags (Hermes, Qwen 2.5 and 3), or tags within tags (Qwen 3.5, GLM 4.5)."""
    for start, end, inner in _between(text, "<tool_call>", "</tool_call>"):
        stripped = inner.strip()
        if stripped.startswith("<function="):
            yield start, end, tagged_call(stripped, tools)
        elif re.match(r"[\w.\-]++\s*+(<arg_key>|\Z)", stripped):
            has_end = text.endswith("</tool_call>", start, end)
            yield start, end, key_value_call(stripped, has_end, tools)
        else:
            yield from _spread(start, end, json_calls(stripped))


@register_tool_format("granite", "<|tool_call|>", begins="<|tool_call|>")
def _granite(text: str, tools: Sequence[dict]) -> Found:
    for start, end, inner in _between(text, "<|tool_call|>", None):
        yield from _spread(start, end, json_calls(inner))


@register_tool_format("llama3", "<|python_tag|>", "Environment: ipython", begins="{")
def _llama3(text: str, tools: Sequence[dict]) -> Found:
    """A turn that is one JSON object, or several with semicolons between them."""
    whole = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"(name|type|function)"', whole):
        return
    decoder, place = json_decoder(), 0
    calls: list[ToolCall | str] = []
    while place < len(whole):
        try:
            value, place = decoder.raw_decode(whole, place)
        except (ValueError, RecursionError) as error:
            calls.append(f"a tool call must be JSON, got {whole[place:][:200]!r}: {error}.")
            break
        inner = value.get("function") if isinstance(value, dict) else None
        calls.append(json_call(inner if isinstance(inner, dict) else value))
        place += len(whole[place:]) - len(whole[place:].lstrip("; \n"))
    yield from _spread(0, len(text), calls)
