"""Formats of rows: their names, how they are recognised, and the columns they require."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from relax.data.limits import DEFAULT, Limits
from relax.data.thoughts import THINKING
from relax.errors import ConfigError, DataError

TRUNCATION_MODES = ("keep_start", "keep_end", "drop", "error", "turns")
TRAIN_ON = ("all_assistant", "last_assistant")

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
_CHATS = ("messages", "conversations")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # read by chat templates
_OF_SFT = ("messages", "conversations", "prompt-completion")
_KNOWN = {"truncation_mode": TRUNCATION_MODES, "train_on": TRAIN_ON, "thinking": THINKING}
_MASKS = ("labels", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class FormatOptions:
    """Options for encoding rows as tokens.

    Args:
      text_field: the column of plain texts.
      completion_only_loss: train on completions only; None: if rows have a prompt.
      assistant_only_loss: train on the assistant's messages only.
      train_on: with assistant_only_loss, which of them: `all_assistant` or `last_assistant`.
      thinking: the assistant's thoughts: `keep`, `strip`, or `last_only`, those behind the last
        message of the user.
      system_prompt: system message of conversations that have none.
      eos_token: end token of plain texts; None: the tokenizer's.
      max_length: tokens per row, >= 2; None: any number (packing splits long rows itself).
      truncation_mode: treatment of longer rows: `keep_start`, `keep_end`, `drop`, `error`, or
        `turns`: keep as many whole turns from the start as fit.
      limits: on rendering.
    """

    text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    train_on: str = "all_assistant"
    thinking: str = "keep"
    system_prompt: str | None = None
    eos_token: str | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    limits: Limits = DEFAULT

    def __post_init__(self):
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}: use one of {known}.")
        if self.train_on != "all_assistant" and not self.assistant_only_loss:
            raise ConfigError(f"train_on {self.train_on} needs assistant_only_loss.")
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

    @property
    def title(self) -> str:
        """The format in words, for messages."""
        kind = "messages" if self.conversational else "texts"
        return self.name if self.name in (kind, "text", "tokens") else f"{self.name} of {kind}"


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
            chatml = found.name == "text" and is_chatml(row[found.columns[0]])
            raise ConfigError(
                f"{name} needs conversations, but {where} is of format {found.name}"
                + (": `relax data convert` makes messages of ChatML texts." if chatml else ".")
            )
    for name, value in (("thinking", "keep"), ("truncation_mode", "turns")):
        given = getattr(options, name)
        if (given == value) == (name == "truncation_mode") and not found.conversational:
            raise ConfigError(
                f"{name} {given} needs conversations, but {where} is of format {found.name}."
            )
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
    chats = [name for name in _CHATS if name in present]
    # Next to whole conversations, `prompt` repeats their beginning, as in UltraChat.
    if "completion" in present or ("prompt" in present and not chats):
        conversational = isinstance(row.get("prompt"), list)
        columns = ("prompt", "completion", *(extra if conversational else ()))
        return Format("prompt-completion", columns, conversational)
    if chats:
        system = ("system",) if "system" in columns else ()
        return Format(chats[0], (chats[0], *system, *extra), True)
    if options.text_field in present:
        return Format("text", (options.text_field,))
    known = ("messages", "prompt", "completion", "conversations", "input_ids")
    close = [
        f"{key!r} (did you mean {match[0]!r}?)"
        for key in row
        # "input" is far from "input_ids" by this measure.
        if (match := difflib.get_close_matches(key, (options.text_field, *known), 1, 0.75))
    ]
    raise DataError(
        f"{where}: no known column: {'; '.join(close) or 'the row has ' + _names(row)}. A row has "
        f"{options.text_field!r}, 'messages', or 'prompt' and 'completion'; another column of "
        "texts is named by dataset_text_field."
    )


def check_row(row: dict, found: Format, where: str, *, only_assistant: bool = False) -> None:
    """Raises DataError if a column of the format is missing or has a wrong type.

    Args:
      only_assistant: whether assistant messages alone are trained on.
    """
    for column in found.columns:
        value = row.get(column)
        if column == "chat_template_kwargs":
            if value is not None and not isinstance(value, dict):
                raise wrong_type(where, column, "an object", value)
        elif column == "system" and found.conversational:
            if value is not None and not isinstance(value, str):
                raise wrong_type(where, column, "a string", value)
        elif column == "tools":
            if value is not None and not isinstance(value, list | str):
                raise wrong_type(where, column, "a list", value)
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
            _check_messages(value, column, where)
            if found.name in _OF_SFT and column != "prompt":
                _check_weights(value, column, where, only_assistant)
        elif not isinstance(value, str):
            raise wrong_type(where, column, "a string", value)


def _check_integers(value, column: str, row: dict, where: str) -> None:
    value = value.tolist() if hasattr(value, "tolist") else value
    # Masks may be booleans, which are ints in Python.
    if not isinstance(value, list) or not all(
        isinstance(item, int) and abs(item) < 2**31 for item in value
    ):
        raise wrong_type(where, column, "a list of 32-bit integers", value)
    if len(value) != len(row["input_ids"]):
        raise DataError(
            f"{where}: {column!r} has {len(value)} items, 'input_ids' has {len(row['input_ids'])}: "
            "they must have equal lengths."
        )


def _check_messages(value, column: str, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise wrong_type(where, column, "a list of messages", value)
    sharegpt = _is_sharegpt(value, column)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for i, message in enumerate(value):
        place = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise wrong_type(where, place, "an object", message)
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
            if content is not None:
                raise wrong_type(where, f"{place}.{content_key}", "a string", content)
            raise DataError(
                f"{where}: {place} needs a string {content_key!r}, it has {_names(message)}."
            )


def _check_weights(messages: list[dict], column: str, where: str, only_assistant: bool) -> None:
    """Refuses weights between 0 and 1, and those of messages whose tokens are not told apart."""
    for i, message in enumerate(messages):
        role = _SHAREGPT_ROLES.get(message.get("from", ""), message.get("role"))
        for key in ("weight", "train"):
            value = message.get(key)
            if value is None:
                continue
            place = f"{where}: {column}[{i}] has {key!r} {value!r}, and"
            if value not in (0, 1):
                raise DataError(f"{place} a message is trained on or not: use 0 or 1.")
            if role != "assistant" and value == only_assistant:
                say = "only the assistant's messages are trained on" if only_assistant else (
                    "only an assistant's message can be left out: use assistant_only_loss"
                )  # fmt: skip
                raise DataError(f"{place} its role is {role!r}: {say}, or leave {key!r} out.")


def conversation(row: dict, column: str, options: FormatOptions) -> list[dict]:
    """The messages of a column, with a system message if they have none.

    It is that of the row's column `system`, or else the system prompt.
    """
    messages = row[column]
    if _is_sharegpt(messages, column):
        messages = [
            {n: v for n, v in m.items() if n not in ("from", "value")}
            | {"role": _SHAREGPT_ROLES[m["from"]], "content": m["value"]}
            for m in messages
        ]
    system = row.get("system") if column in _CHATS else None
    system = system if isinstance(system, str) and system else options.system_prompt
    has_system = messages[0]["role"] in ("system", "developer")
    if system and not has_system and column != "completion":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _is_sharegpt(messages: list, column: str) -> bool:
    """Whether messages have `from` and `value`: `conversations`, unless they have a role."""
    first = messages[0]
    return column in _CHATS and isinstance(first, dict) and (
        "from" in first or (column == "conversations" and "role" not in first)
    )  # fmt: skip


def is_chatml(text) -> bool:
    """Whether a text is a conversation in ChatML's form."""
    return isinstance(text, str) and text.lstrip().startswith("<|im_start|>")


def wrong_type(where: str, place: str, expected: str, value) -> DataError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(f"{where}: {place!r} must be {expected}, it is {shown}.")


def _names(keys) -> str:
    return ", ".join(repr(key) for key in keys) or "nothing"
