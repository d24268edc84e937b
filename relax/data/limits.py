"""Limits on untrusted rows and chat templates; docs/data.md lists them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from relax.errors import ConfigError, DataError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits on reading and rendering rows.

    Args:
      max_row_bytes: bytes of one row: a line of a file, or the texts of a Python row.
      max_json_depth: levels of lists and objects in a row.
      max_file_gib: GiB of all files of a split together; rows are held in memory.
      template_timeout_s: seconds to render one conversation.
      template_output_ratio: characters rendered per character of input (template, messages, tools).
      template_memory_mib: MiB that rendering may allocate.
    """

    max_row_bytes: int = 8 * MIB
    max_json_depth: int = 64
    max_file_gib: float = 32.0
    template_timeout_s: float = 5.0
    template_output_ratio: int = 64
    template_memory_mib: int = 512

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}.")


DEFAULT = Limits()


def row_too_large(where: str, num_bytes: int | None, limits: Limits) -> DataError:
    """The error for a row above `max_row_bytes`; `num_bytes` None: not read to its end."""
    size = "more" if num_bytes is None else f"{num_bytes:,}"
    return DataError(
        f"{where}: the row has {size} bytes, max_row_bytes={limits.max_row_bytes:,}: split the "
        "row, or raise --max_row_bytes."
    )


def check_files(sizes: list[int], what: str, limits: Limits) -> None:
    """Refuses files whose sum of sizes exceeds `max_file_gib`.

    Raises:
      DataError: with the sum.
    """
    if sum(sizes) > limits.max_file_gib * 2**30:
        raise DataError(
            f"{what}: {len(sizes)} files hold {sum(sizes):,} bytes, "
            f"max_file_gib={limits.max_file_gib:g}: rows are held in memory. Train on fewer "
            "files, or raise --max_file_gib."
        )


def check_values(value, where: str, limits: Limits) -> None:
    """Refuses text that no tokenizer can read, and rows that are too large or too deeply nested.

    Raises:
      DataError: half of a surrogate pair in a text or a key; a limit is exceeded.
    """
    size, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            size += _num_bytes(item, where)
            if size > limits.max_row_bytes:
                raise row_too_large(where, None, limits)
        elif isinstance(item, dict | list | tuple):
            if depth >= limits.max_json_depth:
                raise DataError(
                    f"{where}: lists and objects are nested more than "
                    f"max_json_depth={limits.max_json_depth} levels deep: flatten the row, or "
                    "raise --max_json_depth."
                )
            items: Iterable = item
            if isinstance(item, dict):
                for key in item:
                    if isinstance(key, str):
                        _num_bytes(key, where)
                items = item.values()
            # Lists of token ids are long and hold no text.
            stack += [(v, depth + 1) for v in items if isinstance(v, str | dict | list | tuple)]


def _num_bytes(text: str, where: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"{where}: a text holds U+{code:04X}, half of a surrogate pair, at character "
            f"{error.start + 1}: it is no Unicode text. Write the whole character, or remove it."
        ) from error


def parse_json(text: str, where: str):
    """The value of a JSON text inside a row.

    Raises:
      DataError: as "where: reason".
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is broken JSON: {json_reason(error)}.") from error


def json_reason(error: Exception) -> str:
    """The reason for a JSON error, without its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
