"""Readers of data files: one function per suffix, with the place of each row."""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relax.data.arrow import Shape, read_json, shape_of_schema
from relax.data.limits import Limits, json_reason, row_too_large
from relax.data.normalize import CHAT_COLUMNS
from relax.errors import DataError

# Columns of texts that tell an object of columns from a row.
_TEXTS = ("text", "prompt", "completion", "response", "instruction", "output", "chosen", "rejected")
BATCH = 64  # Arrow rows per decoding call


@dataclass(frozen=True)
class FileRows:
    """The rows of a file.

    Attributes:
      rows: rows as stored in the file.
      numbers: line of each row, or its number in an Arrow file, from 1.
      shapes: shapes of an Arrow file's columns, else None.
    """

    rows: list[dict]
    numbers: list[int]
    shapes: dict[str, Shape] | None = None


def read_file(path: Path, limits: Limits) -> FileRows:
    """Reads a file whose suffix is one of `SUFFIXES` or `.txt`.

    Raises:
      DataError: as "file:line: reason".
    """
    with readable(path):
        found = READERS[path.suffix](path, limits)
    if not found.rows:
        raise DataError(f"{path}: the file holds no rows.")
    return found


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context whose errors of the system name the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def lines(path: Path, limits: Limits) -> Iterator[tuple[int, str]]:
    """Line numbers and texts; a line above the limit is refused before it is read completely."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(limits.max_row_bytes + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > limits.max_row_bytes and not raw.endswith(b"\n"):
                raise row_too_large(where, None, limits)
            yield number, decode(raw, where, first=number == 1)


def _read_jsonl(path: Path, limits: Limits) -> FileRows:
    rows, numbers = [], []
    for number, text in lines(path, limits):
        if text.strip():
            where = f"{path}:{number}"
            rows.append(parse_row(text, where))
            numbers.append(number)
    return FileRows(rows, numbers)


def _read_text(path: Path, limits: Limits) -> FileRows:
    """A row for each line that is not blank; only a line feed ends a line, unlike in `str`."""
    rows, numbers = [], []
    for number, text in lines(path, limits):
        if text.strip():
            rows.append({"text": text.rstrip("\r\n")})
            numbers.append(number)
    return FileRows(rows, numbers)


def _read_csv(path: Path, limits: Limits) -> FileRows:
    """Rows of texts, named by the first line; an empty cell is None."""
    rows, numbers = [], []
    line = 0  # the last line read; the csv module counts whole rows

    def texts() -> Iterator[str]:
        nonlocal line
        for number, text in lines(path, limits):
            line = number
            yield text

    # A quoted cell may span lines, and the csv module's cell limit is lower than ours.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_row_bytes))
    reader = csv.DictReader(texts(), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        check_columns(reader.fieldnames or (), path)
        for row in reader:
            where = f"{path}:{line}"
            if None in row or None in row.values():
                got = sum(value is not None for value in row.values()) + len(row.get(None) or ())
                raise DataError(
                    f"{where}: the row has {got - (None in row)} cells, the first line names "
                    f"{len(reader.fieldnames or ())} columns."
                )
            rows.append({name: value or None for name, value in row.items()})
            numbers.append(line)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}.") from error
    return FileRows(rows, numbers)


def check_columns(names: Iterable[str], path: Path) -> None:
    if (name := _repeated(names)) is not None:
        raise DataError(f"{path}: two columns are named {name!r}: rename or remove one.")


def decode(raw: bytes, where: str, first: bool) -> str:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: byte {raw.index(0) + 1} is NUL: the file is damaged, as after a crash "
            "while it was written."
        )
    return text


def parse_row(text: str, where: str) -> dict:
    """The object of a line of JSON."""
    return _object(_parse_line(text, where), where)


def _parse_line(text: str, where: str):
    try:
        return _ROW.decode(text)
    except (ValueError, RecursionError) as error:
        if not text.endswith("\n"):
            raise DataError(
                f"{where}: broken JSON in the last line, which has no line end: the file looks "
                f"truncated ({json_reason(error)})."
            ) from error
        raise DataError(f"{where}: broken JSON: {json_reason(error)}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """An object of a row; of a key that occurs twice one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(
            f"the key {_repeated(key for key, _ in pairs)!r} occurs twice in an object"
        )
    return found


_ROW = json.JSONDecoder(object_pairs_hook=_unique)  # making one costs as much as a short row


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs twice, if any."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is a {type(value).__name__}.")
    return value


def _read_json(path: Path, limits: Limits) -> FileRows:
    """Reads a list of objects, an object of columns, or JSON lines."""
    text = "".join(
        decode(raw, f"{path}:{number}", first=number == 1)
        for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1)
    )
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        try:
            columns = _columns(text, position)
        except ValueError as error:
            raise DataError(f"{path}: {error}.") from error
        return _read_jsonl(path, limits) if columns is None else columns
    rows, numbers = [], []
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    line, counted = 1, 0  # the line number at position `counted`
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: broken JSON: {json_reason(error)}.") from error
        rows.append(_object(value, f"{path}:{line}"))
        numbers.append(line)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{path}:{at}: broken JSON: the list of rows is not closed by ']'.")
    if text[position + 1 :].strip():
        at = text.count("\n", 0, position) + 1
        raise DataError(f"{path}:{at}: broken JSON: text follows the end of the list.")
    return FileRows(rows, numbers)


def _columns(text: str, position: int) -> FileRows | None:
    """The rows of a file that is one object of columns: lists, or pandas' objects by "0", "1", ...

    A single row may hold lists too, of messages or of token ids, so one column must hold texts or
    conversations.
    """
    try:
        value, end = json.JSONDecoder(object_pairs_hook=_unique).raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    if text[end:].strip() or not isinstance(value, dict) or not value:
        return None
    if all(isinstance(v, dict) and [*v] == [str(i) for i in range(len(v))] for v in value.values()):
        value = {name: [*column.values()] for name, column in value.items()}
    if not all(isinstance(column, list) and column for column in value.values()):
        return None
    inner = {name: {type(item) for item in column} for name, column in value.items()}
    is_text = any(inner.get(name) == {str} for name in _TEXTS)
    if not is_text and not any(inner.get(name) == {list} for name in CHAT_COLUMNS):
        return None
    lengths = {name: len(column) for name, column in value.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"its columns have different lengths: {lengths}")
    rows = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return FileRows(rows, list(range(1, len(rows) + 1)))


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_parquet(path: Path, limits: Limits) -> FileRows:
    pyarrow = import_pyarrow(path)
    with readable_arrow(path, pyarrow):
        with pyarrow.parquet.ParquetFile(path) as file:
            return _arrow_rows(path, file.schema_arrow, file.iter_batches(batch_size=BATCH))


def _read_arrow(path: Path, limits: Limits) -> FileRows:
    """Reads a file of `datasets.save_to_disk`, or any Arrow stream or file."""
    pyarrow = import_pyarrow(path)
    with readable_arrow(path, pyarrow), path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(file)
        return _arrow_rows(path, reader.schema, batches)


def _arrow_rows(path: Path, schema, batches) -> FileRows:
    check_columns(schema.names, path)
    shapes = shape_of_schema(schema)
    rows: list[dict] = []
    for batch in batches:
        for row in python_rows(batch, path):
            where = f"{path}:{len(rows) + 1}"
            rows.append({n: read_json(v, shapes[n], where) for n, v in row.items()})
    return FileRows(rows, list(range(1, len(rows) + 1)), shapes)


def python_rows(batch, path: Path) -> list[dict]:
    """The rows of an Arrow batch or table.

    Raises:
      DataError: names the column with a value that Python does not have, such as nanoseconds.
    """
    try:
        return batch.to_pylist()
    except (ValueError, LookupError):
        for name in batch.schema.names:
            try:
                batch.column(name).to_pylist()
            except (ValueError, LookupError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise DataError(
                    f"{path}: column {name!r} holds a value that Python does not have: {reason}. "
                    "Write it as a text or a number, or leave the column out."
                ) from error
        raise


def import_pyarrow(path: Path):
    """The package `pyarrow`, or an error that says how to install it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: {path.suffix[1:]} files need pyarrow: pip install 'relax-trainers[parquet]'."
        ) from error
    return pyarrow


@contextlib.contextmanager
def readable_arrow(path: Path, pyarrow):
    """Context whose errors of Arrow name the file."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        kind = path.suffix[1:]
        raise DataError(f"{path}: not a readable {kind} file: {reason}") from error


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
# Suffixes read from directories, where a .txt file may be anything.
SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".txt")
