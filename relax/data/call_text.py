"""The text of single tool calls: JSON, Python and tags become calls, or sentences to the model.

Nothing is evaluated, and what a call holds is JSON: whatever can be read here can be written again.
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_DEPTH = 32  # of arguments, which stand in messages whose depth is limited too


class ToolCall(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict


def whole(text: str) -> str:
    r"""A text without halves of surrogate pairs, which no tokenizer and no encoding takes.

    >>> whole("a\ud83d") == "a\N{REPLACEMENT CHARACTER}"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def checked(call: ToolCall) -> ToolCall | str:
    """The call with whole characters alone, or what keeps its arguments from being JSON."""
    if _depth_exceeds(call.arguments, MAX_DEPTH):
        return f"the arguments of {call.name} are nested more than {MAX_DEPTH} levels deep."
    try:
        text = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        return f"the arguments of {call.name} must be JSON: {error}."
    return ToolCall(whole(call.name), json.loads(whole(text)))


def _depth_exceeds(value, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [v for v in level if isinstance(v, dict | list | tuple)]
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def _refuse(name: str):
    raise ValueError(f"{name} is not a value of JSON")


def json_decoder() -> json.JSONDecoder:
    """A decoder that refuses NaN and Infinity."""
    return json.JSONDecoder(parse_constant=_refuse)


def json_call(value) -> ToolCall | str:
    """A call from an object with a name and arguments, which Llama calls parameters."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return f"a tool call must be an object with a name, got {json.dumps(value)[:200]}."
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # encoded twice
        try:
            arguments = json_decoder().decode(arguments)
        except (ValueError, RecursionError):
            pass
    if not isinstance(arguments, dict):
        got = json.dumps(arguments)[:200]
        return f"the arguments of {value['name']} must be an object, got {got}."
    return ToolCall(value["name"], arguments)


def json_calls(text: str) -> list[ToolCall | str]:
    """The calls of a JSON object or list; at least one, or an error."""
    try:
        value = json_decoder().decode(text)
    except (ValueError, RecursionError) as error:
        return [f"a tool call must be JSON, got {text.strip()[:200]!r}: {error}."]
    if value == []:
        return ["a list of tool calls must hold at least one call, got []."]
    return [json_call(one) for one in (value if isinstance(value, list) else [value])]


def named_call(name: str, arguments: str) -> ToolCall | str:
    """A call whose arguments alone are JSON."""
    try:
        return json_call({"name": name, "arguments": json_decoder().decode(arguments)})
    except (ValueError, RecursionError) as error:
        return f"the arguments of {name} must be JSON, got {arguments[:200]!r}: {error}."


def python_calls(text: str) -> list[ToolCall | str]:
    """The calls of a list in Python, or of a single call; at least one, or an error."""
    try:
        body = ast.parse(text, mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        if not nodes:
            raise ValueError("the list is empty")
        return [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
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
        keys = [_literal(key) for key in node.keys if key is not None]
        return {str(k): _python_value(v) for k, v in zip(keys, node.values, strict=True)}
    return _literal(node)


def _literal(node: ast.expr) -> str | int | float | bool | None:
    # Elements of sets and of lists as keys cannot be hashed, which would be a TypeError.
    if isinstance(node, ast.Set | ast.List | ast.Dict):
        _refuse(f"a {type(node).__name__.lower()} here")
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        _refuse(type(value).__name__)
    return value


_PARAMETER = re.compile(r"\s*<parameter=([^>]+)>(.*?)</parameter>", re.DOTALL)
_KEY_VALUE = re.compile(r"\s*<arg_key>([^<>]+)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def tagged_call(text: str, tools: Sequence[dict]) -> ToolCall | str:
    """A call like `<function=f><parameter=x>1</parameter></function>`."""
    match = re.fullmatch(r"<function=([^>\s]+)>(.*)</function>", text, re.DOTALL)
    if match is None:
        return f"a tool call must be <function=name>...</function>, got {text[:200]!r}."
    name, inner = match.groups()
    pairs = _pairs(inner, _PARAMETER)
    if pairs is None:
        what = "<parameter=key>value</parameter>"
        return f"the arguments of {name} must each be {what}, got {inner.strip()[:200]!r}."
    return _typed_call(name, pairs, tools)


def key_value_call(text: str, has_end: bool, tools: Sequence[dict]) -> ToolCall | str:
    """A call like `f<arg_key>x</arg_key><arg_value>1</arg_value>`.

    Args:
      has_end: the end mark was there; a call that is cut may lack arguments.
    """
    name, mark, rest = text.partition("<arg_key>")
    name, inner = name.strip(), mark + rest
    if not has_end:
        return f"the call of {name} must end with </tool_call>, got {text[:200]!r}."
    pairs = _pairs(inner, _KEY_VALUE)
    if pairs is None:
        what = "<arg_key>key</arg_key><arg_value>value</arg_value>"
        return f"the arguments of {name} must each be {what}, got {inner[:200]!r}."
    return _typed_call(name, pairs, tools)


def _pairs(text: str, pattern: re.Pattern[str]) -> list[tuple[str, ...]] | None:
    """The pairs that make up a text; None: it holds something else."""
    text, pairs, place = text.rstrip(), [], 0
    while place < len(text):
        match = pattern.match(text, place)
        if match is None:
            return None
        pairs.append(match.groups())
        place = match.end()
    return pairs


def _typed_call(name: str, pairs: list[tuple[str, ...]], tools: Sequence[dict]) -> ToolCall:
    """A call whose arguments are texts, which become the types that the tool's schema names."""
    types = _types(name, tools)
    arguments = {}
    for key, value in pairs:
        value = value.removeprefix("\n").removesuffix("\n")
        if types.get(key) != "string":
            try:
                value = json_decoder().decode(value)
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
