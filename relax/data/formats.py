"""Formats of rows: their names, how they are recognised, and the columns they require."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from relax.data.limits import DEFAULT, Limits
from relax.errors import ConfigError, DataError

TRUNCATION_MODES = ("keep_start", "keep_end", "drop", "error")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # read by chat templates
ALPACA = ("instruction", "output")  # and "input", which may be empty
_OF_SFT = ("messages", "conversations", "prompt-completion")
_MASKS = ("labels", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class FormatOptions:
    """Options for encoding rows as tokens.

    Args:
      text_field: the column of plain texts.
      completion_only_loss: train on completions only; None: if rows have a prompt.
      assistant_only_loss: train on what the template marks as the assistant's only.
      system_prompt: system message of conversations that have none.
      eos_token: end token of plain texts; None: the tokenizer's.
      max_length: tokens per row, >= 2; None: any number (packing splits long rows itself).
      truncation_mode: treatment of longer rows: `keep_start`, `keep_end`, `drop`, `error`.
      limits: on rendering.
    """

    text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    system_prompt: str | None = None
    eos_token: str | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    limits: Limits = DEFAULT

    def __post_init__(self):
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ConfigError(
                f"unknown truncation_mode {self.truncation_mode!r}: use one of {TRUNCATION_MODES}."
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2, got {self.max_length}: "
                "the first token is never predicted."
            )


@dataclass(frozen=True)
class Format:
    """The format of a data set.

    Args:
      name: `tokens`, `text`, `messages`, `conversations` or `prompt-completion`.
      columns: those read from every row.
      conversational: rows are messages, rendered by a chat template.
    """

    name: str
    columns: tuple[str, ...]
    conversational: bool = False


def columns_of(rows: Iterable[dict]) -> tuple[str, ...]:
    """The columns that have a value in some row.

    >>> columns_of([{"a": 1, "b": None}, {"c": 2}])
    ('a', 'c')
    """
    return tuple(
        dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    )


def find_format(
    row: dict, where: str, options: FormatOptions, columns: Iterable[str] = ()
) -> Format:
    """Recognises the format of the first row and refuses options that it does not support.

    Args:
      row: the first row, at `where`.
      options: options for encoding.
      columns: those of all rows; `tools` and masks may first occur in a later one.

    >>> find_format({"prompt": "2+2=", "completion": "4"}, "a.jsonl:1", FormatOptions()).name
    'prompt-completion'
    """
    found = _recognise(row, where, options, columns)
    if options.completion_only_loss and found.name not in ("prompt-completion", "tokens"):
        raise ConfigError(
            f"completion_only_loss needs rows with 'prompt' and 'completion', {where} has "
            f"{found.columns[0]!r}: drop it, or use assistant_only_loss for conversations."
        )
    for name in ("assistant_only_loss", "system_prompt"):
        if getattr(options, name) and not found.conversational:
            raise ConfigError(f"{name} needs conversations, but {where} is of format {found.name}.")
    return found


def _recognise(row: dict, where: str, options: FormatOptions, columns: Iterable[str]) -> Format:
    present = columns_of([row])
    columns = {*present, *columns}
    extra = tuple(c for c in TEMPLATE_COLUMNS if c in columns)
    if "input_ids" in present:
        masks = tuple(c for c in (*_MASKS, "attention_mask") if c in columns)
        return Format("tokens", ("input_ids", *masks))
    if options.text_field != FormatOptions.text_field:
        return Format("text", (options.text_field,))  # asked for by name
    chats = [name for name in ("messages", "conversations") if name in present]
    # Next to whole conversations, `prompt` repeats their beginning, as in UltraChat.
    if "completion" in present or ("prompt" in present and not chats):
        conversational = isinstance(row.get("prompt"), list)
        columns = ("prompt", "completion", *(extra if conversational else ()))
        return Format("prompt-completion", columns, conversational)
    if chats:
        return Format(chats[0], (chats[0], *extra), True)
    if options.text_field in present:
        return Format("text", (options.text_field,))
    known = ("messages", "prompt", "completion", "conversations", "input_ids")
    close = [
        f"{key!r} (did you mean {match[0]!r}?)"
        for key in row
        if (match := difflib.get_close_matches(key, (options.text_field, *known), 1))
    ]
    raise DataError(
        f"{where}: no known column: {'; '.join(close) or 'the row has ' + _names(row)}. A row has "
        f"{options.text_field!r}, 'messages', or 'prompt' and 'completion'; another column of "
        "texts is named by dataset_text_field."
    )


def check_row(row: dict, found: Format, where: str) -> None:
    """Raises DataError if a column of the format is missing or has a wrong type."""
    for column in found.columns:
        value = row.get(column)
        if column == "chat_template_kwargs":
            if value is not None and not isinstance(value, dict):
                raise _wrong_type(where, column, "an object", value)
        elif column == "tools":
            if value is not None and not isinstance(value, list | str):
                raise _wrong_type(where, column, "a list", value)
        elif value is None:
            close = difflib.get_close_matches(column, [k for k in row if k != column], 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(
                f"{where}: column {column!r} is missing; the row has {_names(row)}{hint}. "
                f"Every row must be of the format of the first: {found.name}."
            )
        elif found.name == "tokens":
            _check_integers(value, column, row, where)
        elif found.conversational:
            _check_messages(value, column, where, found.name == "conversations")
            if found.name in _OF_SFT and column != "prompt":
                _check_weights(value, column, where)
        elif not isinstance(value, str):
            raise _wrong_type(where, column, "a string", value)


def _check_integers(value, column: str, row: dict, where: str) -> None:
    value = value.tolist() if hasattr(value, "tolist") else value
    # Masks may be booleans, which are ints in Python.
    if not isinstance(value, list) or not all(
        isinstance(item, int) and abs(item) < 2**31 for item in value
    ):
        raise _wrong_type(where, column, "a list of 32-bit integers", value)
    if len(value) != len(row["input_ids"]):
        raise DataError(
            f"{where}: {column!r} has {len(value)} items, 'input_ids' has {len(row['input_ids'])}: "
            "they must have equal lengths."
        )


def _check_messages(value, column: str, where: str, sharegpt: bool) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong_type(where, column, "a list of messages", value)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for i, message in enumerate(value):
        place = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise _wrong_type(where, place, "an object", message)
        role, content = message.get(role_key), message.get(content_key)
        if not isinstance(role, str):
            raise DataError(
                f"{where}: {place} needs a string {role_key!r}, it has {_names(message)}."
            )
        if sharegpt and role not in _SHAREGPT_ROLES:
            raise DataError(
                f"{where}: {place} is from {role!r}, not one of {_names(_SHAREGPT_ROLES)}."
            )
        # Content may be a list of parts, or absent if the assistant only calls tools.
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise DataError(
                f"{where}: {place} needs a string {content_key!r}, it has {_names(message)}."
            )


def _check_weights(messages: list[dict], column: str, where: str) -> None:
    """Refuses messages that their row excludes from training, which no algorithm reads."""
    for i, message in enumerate(messages):
        for key in ("weight", "train"):
            value = message.get(key)
            if value is not None and value != 1:
                raise DataError(
                    f"{where}: {column}[{i}] has {key!r} {value!r}, and messages have no weights "
                    "here: train on the last turn with 'prompt' and 'completion', or on the "
                    f"assistant's with assistant_only_loss, and leave {key!r} out."
                )


def conversation(row: dict, column: str, options: FormatOptions) -> list[dict]:
    """The messages of a column, with the system prompt if they have no system message."""
    messages = row[column]
    if column == "conversations":
        messages = [
            {n: v for n, v in m.items() if n not in ("from", "value")}
            | {"role": _SHAREGPT_ROLES[m["from"]], "content": m["value"]}
            for m in messages
        ]
    has_system = messages[0]["role"] in ("system", "developer")
    if options.system_prompt and not has_system and column != "completion":
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    return messages


def from_alpaca(row: dict, where: str, *, conversational: bool) -> dict:
    r"""A row with Alpaca's columns as a prompt and a completion.

    >>> from_alpaca({"instruction": "Add", "input": "2, 3", "output": "5"}, "row 0",
    ...             conversational=False)
    {'prompt': 'Add\n\n2, 3', 'completion': '5'}
    """
    for column in ALPACA:
        if not isinstance(row.get(column), str):
            raise _wrong_type(where, column, "a string", row.get(column))
    prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    others = {n: v for n, v in row.items() if n not in (*ALPACA, "input")}
    if not conversational:
        return others | {"prompt": prompt, "completion": row["output"]}
    return others | {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def _wrong_type(where: str, place: str, expected: str, value) -> DataError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(f"{where}: {place!r} must be {expected}, it is {shown}.")


def _names(keys) -> str:
    return ", ".join(repr(key) for key in keys) or "nothing"
