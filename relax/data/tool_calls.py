"""Tool calls in the text of a model: one small parser per format, chosen by the chat template.

A parser splits a turn, decoded with special tokens and without its end token, into the text beside
the calls, the calls, and what is wrong with calls that cannot be read. Nothing is evaluated.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class ToolCall(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict


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
        and of what is no content.
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
    for start, end, found in TOOL_FORMATS[name].parse(text, tools):
        content.append(text[last:start])
        last = end
        if isinstance(found, ToolCall):
            calls.append(found)
        elif isinstance(found, Hidden):
            thoughts.append(found.thoughts.strip())
        else:
            errors.append(found)
    if not content:
        return Turn(text, [], [])
    whole = "".join([*content, text[last:]]).strip()
    return Turn(whole, calls, errors, "\n".join(filter(None, thoughts)))


def _between(text: str, begin: str, end: str | None) -> Iterator[tuple[int, int, str]]:
    """The places and contents of what stands between two marks; the last end may be missing."""
    ends = "\\Z" if end is None else f"(?:{re.escape(end)}|\\Z)"
    for match in re.finditer(f"{re.escape(begin)}(.*?){ends}", text, re.DOTALL):
        yield match.start(), match.end(), match.group(1)


def _json_call(value) -> ToolCall | str:
    """A call from an object with a name and arguments, which Llama calls parameters."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return f"a tool call must be an object with a name, got {json.dumps(value)[:200]}."
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # encoded twice
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass
    if not isinstance(arguments, dict):
        got = json.dumps(arguments)[:200]
        return f"the arguments of {value['name']} must be an object, got {got}."
    return ToolCall(value["name"], arguments)


def _json_calls(text: str) -> list[ToolCall | str]:
    """The calls of a JSON object or list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [f"a tool call must be JSON, got {text.strip()[:200]!r}: {error}."]
    return [_json_call(one) for one in (value if isinstance(value, list) else [value])]


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
        yield from _spread(start, end, (_json_calls if json_like else _python_calls)(stripped))


def _python_calls(text: str) -> list[ToolCall | str]:
    try:
        body = ast.parse(text, mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [f"a tool call must be a list of calls like f(x=1), got {text[:200]!r}: {error}."]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("not a call with keyword arguments")
    return ToolCall(
        ast.unparse(node.func), {str(k.arg): _python_value(k.value) for k in node.keywords}
    )


def _python_value(node: ast.expr):
    """A literal, with JSON's names of constants too."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return json.loads(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        if any(key is None for key in node.keys):
            raise ValueError("not a literal")
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return {str(k): _python_value(v) for k, v in zip(keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{type(value).__name__} is not a value of JSON")
    return value


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
            yield start, stop, ToolCall(match.group(1), json.loads(made))
        except (ValueError, RecursionError) as error:
            yield start, stop, f"the arguments of {match.group(1)} cannot be read: {error}."


@register_tool_format("gemma", "<start_function_call>", begins="<start_function_call>")
def _gemma(text: str, tools: Sequence[dict]) -> Found:
    yield from _braces(text, "<start_function_call>", "<end_function_call>", "<escape>")


@register_tool_format("gemma4", "<|tool_call>", begins="<|tool_call>")
def _gemma4(text: str, tools: Sequence[dict]) -> Found:
    yield from _braces(text, "<|tool_call>", "<tool_call|>", '<|"|>')


@register_tool_format("gpt_oss", "<|channel|>", begins="<|channel|>commentary to=")
def _gpt_oss(text: str, tools: Sequence[dict]) -> Found:
    """Messages in channels: thoughts in `analysis`, calls by a recipient, and content."""
    # The recipient comes before or after the channel: models write both, and templates the former.
    pattern = r"(?:<\|start\|>assistant)?\s*(?:to=([\w.\-]+))?\s*<\|channel\|>(\w+)"
    pattern += r"(?:\s*to=([\w.\-]+))?\s*(?:<\|constrain\|>\s*\w+|\w+)?\s*<\|message\|>"
    pattern += r"(.*?)(?:<\|call\|>|<\|end\|>|<\|return\|>|(?=<\|start\|>)|\Z)"
    for match in re.finditer(pattern, text, re.DOTALL):
        before, channel, after, said = match.groups()
        name = (before or after or "").removeprefix("functions.")
        if name:
            yield match.start(), match.end(), _named_call(name, said)
        elif channel == "analysis":
            yield match.start(), match.end(), Hidden(said)
        else:
            yield match.start(), match.start(4), Hidden()
            yield match.end(4), match.end(), Hidden()


def _named_call(name: str, arguments: str) -> ToolCall | str:
    try:
        return _json_call({"name": name, "arguments": json.loads(arguments or "{}")})
    except (ValueError, RecursionError) as error:
        return f"the arguments of {name} must be JSON, got {arguments[:200]!r}: {error}."


@register_tool_format("mistral", "[TOOL_CALLS]", begins="[TOOL_CALLS]")
def _mistral(text: str, tools: Sequence[dict]) -> Found:
    """A JSON list of calls, or name[ARGS]{...} for each."""
    for start, end, inner in _between(text, "[TOOL_CALLS]", None):
        parts = [part for part in inner.split("[TOOL_CALLS]") if part.strip()]
        calls: list[ToolCall | str] = []
        for part in parts:
            name, arguments_mark, arguments = part.partition("[ARGS]")
            if not arguments_mark:
                calls += _json_calls(part)
                continue
            made = json.dumps({"name": name.partition("[CALL_ID]")[0].strip()})[:-1]
            calls += _json_calls(f'{made}, "arguments": {arguments}}}')
        yield from _spread(start, end, calls)


@register_tool_format("hermes", "<tool_call>", begins="<tool_call>")
def _hermes(text: str, tools: Sequence[dict]) -> Found:
    """JSON within tags (Hermes, Qwen 2.5 and 3), or tags within tags (Qwen 3.5, GLM 4.5)."""
    for start, end, inner in _between(text, "<tool_call>", "</tool_call>"):
        stripped = inner.strip()
        if stripped.startswith("<function="):
            yield start, end, _tagged_call(stripped, tools)
        elif re.match(r"[\w.\-]+\s*(<arg_key>|\Z)", stripped):
            name, pairs = re.split(r"\s*(?=<arg_key>|\Z)", stripped, maxsplit=1)
            pattern = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
            yield start, end, _typed_call(name, re.findall(pattern, pairs, re.DOTALL), tools)
        else:
            yield from _spread(start, end, _json_calls(stripped))


def _tagged_call(text: str, tools: Sequence[dict]) -> ToolCall | str:
    match = re.fullmatch(r"<function=([^>\s]+)>(.*)</function>", text, re.DOTALL)
    if match is None:
        return f"a tool call must be <function=name>...</function>, got {text[:200]!r}."
    name, inner = match.groups()
    pairs = re.findall(r"<parameter=([^>]+)>(.*?)</parameter>", inner, re.DOTALL)
    return _typed_call(name, pairs, tools)


def _typed_call(name: str, pairs: list[tuple[str, str]], tools: Sequence[dict]) -> ToolCall:
    """A call whose arguments are texts, which become the types that the tool's schema names."""
    types = _types(name, tools)
    arguments = {}
    for key, value in pairs:
        value = value.removeprefix("\n").removesuffix("\n")
        if types.get(key) != "string":
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                pass  # a text of a tool without a schema
        arguments[key] = value
    return ToolCall(name, arguments)


def _types(name: str, tools: Sequence[dict]) -> dict:
    """The types of a tool's parameters, as far as its schema gives them."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {k: v.get("type") for k, v in properties.items() if isinstance(v, dict)}
    return {}


@register_tool_format("granite", "<|tool_call|>", begins="<|tool_call|>")
def _granite(text: str, tools: Sequence[dict]) -> Found:
    for start, end, inner in _between(text, "<|tool_call|>", None):
        yield from _spread(start, end, _json_calls(inner))


@register_tool_format("llama3", "<|python_tag|>", "Environment: ipython", begins="{")
def _llama3(text: str, tools: Sequence[dict]) -> Found:
    """A turn that is one JSON object, or several with semicolons between them."""
    whole = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"(name|type|function)"', whole):
        return
    decoder, place = json.JSONDecoder(), 0
    calls: list[ToolCall | str] = []
    while place < len(whole):
        try:
            value, place = decoder.raw_decode(whole, place)
        except (ValueError, RecursionError) as error:
            calls.append(f"a tool call must be JSON, got {whole[place:][:200]!r}: {error}.")
            break
        inner = value.get("function") if isinstance(value, dict) else None
        calls.append(_json_call(inner if isinstance(inner, dict) else value))
        place += len(whole[place:]) - len(whole[place:].lstrip("; \n"))
    yield from _spread(0, len(text), calls)
