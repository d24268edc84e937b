"""Rows that stay in their files: read again whenever they are needed, one by one or in a pass."""

import array
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from relax.data import readers
from relax.data.arrow import Alignment, Shape, read_json
from relax.data.limits import Limits
from relax.data.normalize import change_notes, normal_row
from relax.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")


class View(Sequence):
    """A sequence that is defined by `__len__` and `row`; slices are lists."""

    def row(self, i: int) -> dict:
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(int(index) % len(self))

    def __iter__(self) -> Iterator[dict]:
        return map(self.row, range(len(self)))


class StoredRows(View):
    """The rows of files in their normal form, see `relax.data.normalize`.

    Args:
      files: files with one of `SUFFIXES`.
      limits: on each row.

    Attributes:
      changes: what was normalised in the last pass over all rows.
    """

    def __init__(self, files: Sequence[Path], limits: Limits):
        makers = {".parquet": _Parquet}
        self._stamps = {path: _stamp(path) for path in files}
        self.limits, self.changes = limits, Counter[str]()
        self._is_normal = False  # known after a pass in which nothing was changed
        self.files = [makers.get(path.suffix, _JsonLines)(path, limits) for path in files]

    @property
    def notes(self) -> tuple[str, ...]:
        return change_notes(self.changes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[dict]:
        changes: Counter[str] = Counter()
        for file in self.files:
            count = 0
            for number, row in file:
                count += 1
                yield self._normal(row, f"{file.path}:{number}", changes)
            if not count:
                raise DataError(f"{file.path}: the file holds no rows.")
            self._check_unchanged(file.path)
        self.changes = changes
        self._is_normal = not changes

    def row(self, i: int) -> dict:
        file, place = self._place(i)
        self._check_unchanged(file.path)
        return self._normal(file.row(place), f"{file.path}:{file.number(place)}", Counter())

    def _check_unchanged(self, path: Path) -> None:
        """Rows that are read again must be those that were tokenised."""
        if _stamp(path) != self._stamps[path]:
            raise DataError(
                f"{path}: the file was changed while this run reads it, so that its rows are no "
                "longer those that were tokenised. Leave it as it is, and start again."
            )

    def origin(self, i: int) -> str:
        """The file and line of a row."""
        file, place = self._place(i)
        return f"{file.path}:{file.number(place)}"

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for file in self.files:
            starts.append(starts[-1] + len(file))
        return starts

    def _place(self, i: int) -> tuple[Any, int]:
        file = bisect_right(self._starts, i) - 1
        return self.files[file], i - self._starts[file]

    @cached_property
    def _alignment(self) -> Alignment | None:
        """What the schemas of Arrow files say about nulls, if all files are of Arrow."""
        if not all(isinstance(file, _Parquet) for file in self.files):
            return None
        shapes: dict[str, Shape] = {}
        for file in self.files:
            shapes |= file.shapes or {}
        alignment = Alignment(shapes)
        if alignment.columns:
            for file in self.files:
                for _, row in file:
                    alignment.look(row)
        return alignment

    def _normal(self, row: dict, where: str, counts: Counter[str]) -> dict:
        if self._alignment is not None:
            row = self._alignment.cleaned(row)
        if self._is_normal:
            return row
        changes: set[str] = set()
        row = normal_row(row, where, self.limits, changes)
        counts.update(changes)
        return row


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs after a change of a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


class _JsonLines:
    """A file of JSON lines; blank lines are no rows."""

    def __init__(self, path: Path, limits: Limits):
        self.path, self.limits = path, limits
        self.shapes: dict[str, Shape] | None = None
        self._file: Any = None

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        with readers.readable(self.path):
            for number, text in readers.lines(self.path, self.limits):
                if text.strip():
                    yield number, readers.parse_row(text, f"{self.path}:{number}")

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """The offset and the number of each line that is a row."""
        offsets, numbers, offset = array.array("q"), array.array("q"), 0
        with readers.readable(self.path), self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # What is blank is decided by the text, as in a pass over the rows.
                if line.startswith(b"{") or self._text(line, number).strip():
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        if not offsets:
            raise DataError(f"{self.path}: the file holds no rows.")
        return np.frombuffer(offsets, np.int64), np.frombuffer(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._index[0])

    def number(self, i: int) -> int:
        return int(self._index[1][i])

    def row(self, i: int) -> dict:
        if self._file is None:
            self._file = self.path.open("rb")
            weakref.finalize(self, self._file.close)
        self._file.seek(int(self._index[0][i]))
        where = f"{self.path}:{self.number(i)}"
        return readers.parse_row(self._text(self._file.readline(), self.number(i)), where)

    def _text(self, raw: bytes, number: int) -> str:
        return readers.decode(raw, f"{self.path}:{number}", first=number == 1)


class _Parquet:
    """A parquet file, of which one group of rows is in memory at a time."""

    def __init__(self, path: Path, limits: Limits):
        self.path = path
        self.pyarrow = readers.import_pyarrow(path)
        with readers.readable_arrow(path, self.pyarrow):
            self.file = self.pyarrow.parquet.ParquetFile(path)
        readers.check_columns(self.file.schema_arrow.names, path)
        self.shapes: dict[str, Shape] | None = readers.shape_of_schema(self.file.schema_arrow)
        counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self._starts = np.cumsum([0, *counts]).tolist()
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        number = 0
        with readers.readable_arrow(self.path, self.pyarrow):
            for batch in self.file.iter_batches(batch_size=readers.BATCH):
                for row in readers.python_rows(batch, self.path):
                    number += 1
                    yield number, self._read(row, number)

    def number(self, i: int) -> int:
        return i + 1

    def row(self, i: int) -> dict:
        group = bisect_right(self._starts, i) - 1
        if self._group[0] != group:
            with readers.readable_arrow(self.path, self.pyarrow):
                self._group = group, self.file.read_row_group(group)
        one = self._group[1].slice(i - self._starts[group], 1)
        (row,) = readers.python_rows(one, self.path)
        return self._read(row, i + 1)

    def _read(self, row: dict, number: int) -> dict:
        where, shapes = f"{self.path}:{number}", self.shapes or {}
        return {name: read_json(value, shapes[name], where) for name, value in row.items()}


class Selected(View):
    """Some rows of others, by index."""

    def __init__(self, rows: Sequence[dict], index: Sequence[int] | np.ndarray):
        self.rows, self.chosen = rows, index

    def __len__(self) -> int:
        return len(self.chosen)

    def row(self, i: int) -> dict:
        return self.rows[int(self.chosen[i])]


class Chained(View):
    """The rows of several sequences, one behind the other, named in their notes."""

    def __init__(self, parts: Sequence[Sequence[dict]], names: Sequence[str]):
        self.parts, self.names = parts, names

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + len(part))
        return starts

    @property
    def notes(self) -> tuple[str, ...]:
        named = zip(self.names, self.parts, strict=True)
        return tuple(f"{name}: {note}" for name, part in named for note in notes_of(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[dict]:
        for part in self.parts:
            yield from part

    def row(self, i: int) -> dict:
        part = bisect_right(self._starts, i) - 1
        return self.parts[part][i - self._starts[part]]


class Mapped(View):
    """Rows that are changed when they are read; the change gets a row and its index."""

    def __init__(self, rows: Sequence[dict], change: Callable[[dict, int], dict]):
        self.rows, self.change = rows, change

    @property
    def notes(self) -> tuple[str, ...]:
        return notes_of(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict]:
        return map(self.change, self.rows, range(len(self)))

    def row(self, i: int) -> dict:
        return self.change(self.rows[i], i)


def notes_of(rows: Sequence[dict]) -> tuple[str, ...]:
    """What was normalised in the last pass over rows; nothing for a list."""
    return getattr(rows, "notes", ())
