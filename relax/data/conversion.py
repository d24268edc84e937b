r"""Rows in the forms that other tools write: Alpaca, prompt and response, ShareGPT, ChatML.

`with_known_columns` reads them in SFT, `as_messages` is `relax data convert`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

from relax.data.formats import (
    Format,
    FormatOptions,
    check_row,
    columns_of,
    conversation,
    is_chatml,
    wrong_type,
)
from relax.data.reading import Rows
from relax.data.stored import Mapped
from relax.errors import DataError

_ALPACA = ("instruction", "output")  # and "input", which may be empty
_RESPONSE = ("prompt", "response")
_KNOWN = {"input_ids", "messages", "conversations", "completion", "chosen"}
_TURN = re.compile(r"\s*<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def with_known_columns(rows: Rows, *, conversational: bool, text_field: str = "text") -> Rows:
    """Alpaca's rows, and those with `prompt` and `response`, as `prompt` and `completion`.

    Other rows are unchanged; the report says what was read in another way.

    Args:
      conversational: make messages of them, for a chat template.
      text_field: the column of plain texts.
    """
    first = rows.rows[0]
    present = set(columns_of([first]))
    if text_field in present and is_chatml(first[text_field]):
        note = "rows are ChatML texts, trained whole: `relax data convert` makes messages of them"
        return dataclasses.replace(rows, notes=(*rows.notes, note))
    if present & (_KNOWN | {text_field} - {"text"}):
        return _with_system_note(rows, present)
    if present >= set(_ALPACA) and "prompt" not in present:
        convert, said = _from_alpaca, "instruction and input are read as the prompt, output as"
    elif present >= set(_RESPONSE):
        convert, said = _from_response, "response is read as"
    else:
        return rows

    def change(row: dict, i: int) -> dict:
        return convert(row, rows.origin(i), conversational)

    made = Mapped(rows.rows, change)
    kind = "messages" if conversational else "texts, since the tokenizer has no chat template"
    note = f"{said} the completion ({kind})"
    kept = [*made] if isinstance(rows.rows, list) else made
    return dataclasses.replace(rows, rows=kept, notes=(*rows.notes, note))


def as_messages(rows: Rows) -> tuple[list[dict], dict[str, int]]:
    """Rows with a column `messages`, from any known form, and how many there were of each.

    Columns that are not part of the conversation are kept.

    Raises:
      DataError: a row is of no known form.
    """
    counts: Counter[str] = Counter()
    made = []
    for i, row in enumerate(rows.rows):
        where = rows.origin(i)
        form, used, messages = _messages_of(row, where)
        counts[form] += 1
        rest = {n: v for n, v in row.items() if n not in used and v is not None}
        made.append({"messages": messages, **rest})
    return made, dict(counts)


def _messages_of(row: dict, where: str) -> tuple[str, tuple[str, ...], list[dict]]:
    """The form of a row, the columns that it uses, and its messages."""
    present = set(columns_of([row]))
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list) and row[column]:
            check_row(row, Format(column, (column,), True), where)
            form = "ShareGPT" if "from" in row[column][0] else "messages"
            return form, (column, "system"), conversation(row, column, FormatOptions())
    if isinstance(row.get("text"), str) and is_chatml(row["text"]):
        return "ChatML", ("text",), _from_chatml(row["text"], where)
    forms: tuple[tuple[str, tuple[str, ...], Callable | None], ...] = (
        ("Alpaca", (*_ALPACA, "input"), _from_alpaca),
        ("prompt and response", _RESPONSE, _from_response),
        ("prompt and completion", ("prompt", "completion"), None),
    )
    for form, columns, convert in forms:
        if present >= set(columns) - {"input"}:
            made = convert(row, where, True) if convert else _conversational(row, where)
            check_row(made, Format("prompt-completion", ("prompt", "completion"), True), where)
            both = {"messages": made["prompt"] + made["completion"], "system": row.get("system")}
            messages = conversation(both, "messages", FormatOptions())
            return form, (*columns, "system"), messages
    raise DataError(
        f"{where}: the row is of no known form: it has {', '.join(map(repr, row))}. Known are "
        "messages, ShareGPT (conversations), Alpaca (instruction, input, output), prompt and "
        "response, prompt and completion, and ChatML texts (text)."
    )


def _from_alpaca(row: dict, where: str, conversational: bool) -> dict:
    """The row with Alpaca's columns as prompt and completion.

    >>> _from_alpaca({"instruction": "Add", "input": "2, 3", "output": "5"}, "row 0", False)
    {'prompt': 'Add\\n\\n2, 3', 'completion': '5'}
    """
    for column in _ALPACA:
        if not isinstance(row.get(column), str):
            raise wrong_type(where, column, "a string", row.get(column))
    prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    others = {n: v for n, v in row.items() if n not in (*_ALPACA, "input")}
    made = others | {"prompt": prompt, "completion": row["output"]}
    return _conversational(made, where) if conversational else made


def _from_response(row: dict, where: str, conversational: bool) -> dict:
    if row.get("response") is None:
        raise wrong_type(where, "response", "a string", None)
    made = {n: v for n, v in row.items() if n != "response"} | {"completion": row["response"]}
    chat = conversational or isinstance(row["prompt"], list)
    return _conversational(made, where) if chat else made


def _conversational(row: dict, where: str) -> dict:
    """The row with the texts of prompt and completion as messages."""
    made = dict(row)
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(column)
        if isinstance(value, str):
            made[column] = [{"role": role, "content": value}]
        elif not isinstance(value, list) or not value:
            raise wrong_type(where, column, "a string or a list of messages", value)
    return made


def _from_chatml(text: str, where: str) -> list[dict]:
    """The messages of a ChatML text.

    >>> _from_chatml("<|im_start|>user\\nHi<|im_end|>\\n", "row 0")
    [{'role': 'user', 'content': 'Hi'}]
    """
    messages, place = [], 0
    for turn in _TURN.finditer(text):
        if turn.start() != place:
            break
        messages.append({"role": turn[1].strip(), "content": turn[2]})
        place = turn.end()
    if place != len(text) or not messages:
        raise DataError(
            f"{where}: the ChatML text has {text[place : place + 40]!r} at character {place} "
            "between its turns: each is <|im_start|>role, a line break, the text and <|im_end|>."
        )
    return messages


def _with_system_note(rows: Rows, present: set[str]) -> Rows:
    if "system" not in present or not present & {"messages", "conversations"}:
        return rows
    note = "the column system is the system message of conversations that have none"
    return dataclasses.replace(rows, notes=(*rows.notes, note))
