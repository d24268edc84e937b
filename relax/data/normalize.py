"""The normal form of rows from any source, see the table in docs/data.md. Pure functions.

Every reader calls `normalize`, so all algorithms see the same rows. A row in normal form is
returned as it is, not copied.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from relax.data.limits import DEFAULT, Limits, check_values, parse_json
from relax.errors import DataError

# Columns that are messages, or may be.
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_COMPLETIONS = ("completion", "chosen", "rejected")
_ALWAYS_CHAT = ("messages", "conversations")
_TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's names of text parts

NOTES = {
    "json": "{} rows hold messages, tools or template arguments as JSON texts: read as JSON",
    "arguments": "{} rows hold arguments of tool calls as JSON texts: read as objects",
    "parts": "{} rows hold message content as text parts: joined to one text",
    "repeats": "{} rows repeat the messages of the prompt in their completions: taken once",
}


def normalize(
    rows: list[dict], origin: Callable[[int], str], limits: Limits = DEFAULT
) -> tuple[list[dict], tuple[str, ...]]:
    """Rows in their normal form, and a note for each kind of change.

    Args:
      rows: rows as read.
      origin: gives the place of row i, for errors.
      limits: limits on each row.

    Raises:
      DataError: as "file:line: reason": a text that is not Unicode, broken JSON in a column that
        holds JSON, message content that is no text, a row above the limits.

    >>> part = [{"type": "text", "text": "Hi"}]
    >>> normalize([{"messages": [{"role": "user", "content": part}]}], str)[0]
    [{'messages': [{'role': 'user', 'content': 'Hi'}]}]
    """
    counts: Counter[str] = Counter()
    normal = []
    for i, row in enumerate(rows):
        changes: set[str] = set()
        normal.append(normal_row(row, origin(i), limits, changes))
        counts.update(changes)
    return normal, change_notes(counts)


def change_notes(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A note for each kind of change, by its number of rows."""
    return tuple(NOTES[name].format(f"{counts[name]:,}") for name in NOTES if counts.get(name))


def normal_row(row: dict, where: str, limits: Limits, changes: set[str]) -> dict:
    """The normal form of a row; adds the kinds of its changes."""
    check_values(row, where, limits)
    new: dict[str, Any] = {}
    for column in CHAT_COLUMNS:
        value = row.get(column)
        if value is not None:
            new[column] = _chat(value, column, where, changes)
    for column in _COMPLETIONS:
        if column in new:
            new[column] = _without_prompt(new[column], new.get("prompt"), changes)
    for column in ("tools", "chat_template_kwargs"):
        if row.get(column) is not None:
            new[column] = _tools(row[column], column, where, changes)
    changed = {name: value for name, value in new.items() if value is not row[name]}
    if not changed:
        return row
    check_values(changed, where, limits)  # JSON inside JSON adds a level
    return {**row, **changed}


def _chat(value, column: str, where: str, changes: set[str]):
    """The messages of a column; any other value is returned as it is."""
    if isinstance(value, str):
        if column in _ALWAYS_CHAT and value.lstrip().startswith("["):
            value = parse_json(value, f"{where}: {column!r}")
        elif (messages := _messages_in(value)) is not None:
            value = messages
        else:
            return value
        changes.add("json")
    if hasattr(value, "tolist"):
        value = value.tolist()  # numpy's, of a pandas frame or a formatted data set
    if not isinstance(value, list | tuple):
        return value
    messages = [
        _message(message, f"{column}[{i}]", where, changes) for i, message in enumerate(value)
    ]
    same = len(messages) == len(value) and all(a is b for a, b in zip(messages, value, strict=True))
    return value if same and isinstance(value, list) else messages


def _messages_in(text: str) -> list | None:
    """The messages of which a text is the JSON, as in a CSV file; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    are_messages = found and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in found)
    return found if are_messages else None


def _without_prompt(completion, prompt, changes: set[str]):
    """The messages of a completion behind those of the prompt, with or without its system message.

    >>> user, bot = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    >>> _without_prompt([user, bot], [user], set()) == [bot]
    True
    """
    if not (isinstance(completion, list) and isinstance(prompt, list)):
        return completion
    has_system = (
        bool(prompt) and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system"
    )
    for repeated in (prompt, prompt[has_system:]):
        if repeated and len(completion) > len(repeated):
            if completion[: len(repeated)] == repeated:
                changes.add("repeats")
                return completion[len(repeated) :]
    return completion


def _message(message, place: str, where: str, changes: set[str]):
    if isinstance(message, str) and message.lstrip().startswith("{"):
        message = parse_json(message, f"{where}: {place}")
        changes.add("json")
    if not isinstance(message, Mapping):
        return message  # refused where formats are checked
    new: dict[str, Any] = {}
    for key in ("content", "value"):
        if isinstance(message.get(key), list | tuple):
            new[key] = _joined(message[key], f"{place}.{key}", where)
            changes.add("parts")
    if message.get("tool_calls") is not None:
        calls = _calls(message["tool_calls"], f"{place}.tool_calls", where, changes)
        if calls is not message["tool_calls"]:
            new["tool_calls"] = calls
    if isinstance(message.get("function_call"), Mapping):  # OpenAI's form before tool_calls
        call = _call(message["function_call"], f"{place}.function_call", where, changes)
        if call is not message["function_call"]:
            new["function_call"] = call
    return {**message, **new} if new or not isinstance(message, dict) else message


def _joined(parts, place: str, where: str) -> str:
    """The concatenated text of content parts, as templates that accept parts write it."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise DataError(
                f"{where}: {place}[{i}] is a part of type {kind!r}, and models are trained on "
                "text parts only ({'type': 'text', 'text': ...}): leave the row or the part out."
            )
        texts.append(text)
    return "".join(texts)


def _calls(calls, place: str, where: str, changes: set[str]):
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}: {place}")
        changes.add("json")
    if hasattr(calls, "tolist"):
        calls = calls.tolist()
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}: {place} must be a list of calls, it is a {_type(calls)}.")
    new = []
    for i, call in enumerate(calls):
        if isinstance(call, str):
            call = parse_json(call, f"{where}: {place}[{i}]")
            changes.add("json")
        if not isinstance(call, Mapping):
            raise DataError(f"{where}: {place}[{i}] must be an object, it is a {_type(call)}.")
        function = call.get("function")
        if isinstance(function, Mapping):
            made = _call(function, f"{place}[{i}].function", where, changes)
            new.append(call if made is function else {**call, "function": made})
        else:
            new.append(_call(call, f"{place}[{i}]", where, changes))
    same = isinstance(calls, list) and all(a is b for a, b in zip(new, calls, strict=True))
    return calls if same else new


def _call(function: Mapping, place: str, where: str, changes: set[str]) -> Mapping:
    """A function's name, and its arguments as an object, which templates write as JSON."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    changes.add("arguments")
    # An empty text often stands for no arguments.
    parsed = parse_json(arguments, f"{where}: {place}.arguments") if arguments.strip() else {}
    if not isinstance(parsed, dict | list):
        raise DataError(
            f"{where}: {place}.arguments must be the JSON text of an object, it is that of a "
            f"{_type(parsed)}."
        )
    return {**function, "arguments": parsed}


def _tools(value, column: str, where: str, changes: set[str]):
    if isinstance(value, str):
        changes.add("json")
        if not value.strip():
            return None
        value = parse_json(value, f"{where}: {column!r}")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list) and any(isinstance(tool, str) for tool in value):
        changes.add("json")
        return [
            parse_json(tool, f"{where}: {column}[{i}]") if isinstance(tool, str) else tool
            for i, tool in enumerate(value)
        ]
    return value


def _type(value) -> str:
    return type(value).__name__
