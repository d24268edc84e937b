"""Tokenised rows on disk: made once, found by their content, and memory-mapped.

A directory named by a key holds an `.npy` file for each array, and `about.json`: what the maker of
the arrays says about them, such as the report on the rows, and the checksums of the files. The key
is a digest of all that the tokens depend on, so a directory is never changed; it is written under a
temporary name and renamed.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

import relax
from relax.data.digest import digest_of, files_key
from relax.data.examples import Block, Columns, Examples, checksum, write_blocks
from relax.files import TMP_SUFFIX, atomic_write, fsync_path

MIN_BYTES = 16 * 2**20  # of files that are worth it where no directory is named
_ABOUT = "about.json"
_HEADER = 128  # bytes of an .npy header
_BLOCK = 2**22  # bytes per read of a file
_LEFT_S = 24 * 3600  # age of a half-written entry that nobody writes any more


Report = TypeVar("Report")


class Entry(NamedTuple):
    """Arrays that were kept.

    Attributes:
      columns: the arrays by name, mapped.
      checksums: the crc32 of each.
      about: what was said about them when they were made.
    """

    columns: dict[str, np.ndarray]
    checksums: dict[str, int]
    about: dict[str, Any]


class ExampleCache:
    """Tokenised rows in a directory.

    Args:
      directory: made where it does not exist.
      say: told what was found and made.
    """

    def __init__(self, directory: str | Path, say: Callable[[str], None] = lambda line: None):
        self.directory, self.say = Path(directory), say

    def find_or_make(self, key: str, make: Callable[["Writer"], dict]) -> Entry | None:
        """The result of `load`, or else of `keep`; None if the directory cannot be written."""
        try:
            return self.load(key) or self.keep(key, make)
        except OSError as error:
            reason = error.strerror or error
            self.say(
                f"tokenised rows are not kept: '{self.directory}' cannot be written ({reason}). "
                "Name another dataset_cache_dir, or none"
            )
            return None

    def load(self, key: str) -> Entry | None:
        """The arrays of a key; None: there are none.

        A damaged entry is reported and removed, so that it is made again.
        """
        entry = self.directory / key
        if not entry.is_dir():
            return None
        try:
            found = _open(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"the tokenised rows in '{entry}' are damaged ({error}): they are made again")
            shutil.rmtree(entry, ignore_errors=True)
            return None
        self.say(f"tokenised rows are read from '{entry}'")
        return found

    def _sweep(self) -> None:
        """Removes what runs that were killed have left; those of today may still be written."""
        for left in self.directory.glob(f"*{TMP_SUFFIX}"):
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - _LEFT_S:
                    shutil.rmtree(left)

    def keep(self, key: str, make: Callable[["Writer"], dict]) -> Entry:
        """Makes an entry and opens it.

        Args:
          make: writes the arrays, and returns what is to be kept about them, as JSON types.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        made = tempfile.mkdtemp(prefix=f"{key[:16]}-", suffix=TMP_SUFFIX, dir=self.directory)
        entry = self.directory / key
        try:
            writer = Writer(Path(made))
            writer.finish(make(writer))
            try:
                os.rename(made, entry)
            except OSError:
                if not entry.is_dir():  # else another run was first with the same rows
                    raise
            found = _open(entry)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        self.say(
            f"tokenised rows are kept in '{entry}' for runs on the same data "
            f"({_size(entry)}; {_size(self.directory)} in all: delete the directory to clear them)"
        )
        return found


def _size(directory: Path) -> str:
    """The size of all files below a directory, in words."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # another run may rename it
            total += path.stat().st_size
    return f"{total / 2**30:.1f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"


class Writer:
    """Writes arrays into the files of a directory, and maps them."""

    def __init__(self, directory: Path):
        self.directory = directory

    @contextlib.contextmanager
    def growing(self, name: str, dtype) -> Iterator[BinaryIO]:
        """A file that takes the bytes of a flat array, one part after the other."""
        with self._path(name).open("wb") as file:
            file.write(bytes(_HEADER))
            yield file
            count = (file.tell() - _HEADER) // np.dtype(dtype).itemsize
            file.seek(0)
            file.write(_header(dtype, count))

    def save(self, name: str, values: np.ndarray) -> None:
        """Writes a flat array."""
        with self.growing(name, values.dtype) as file:
            file.write(values.tobytes())

    def mapped(self, name: str) -> np.ndarray:
        """The array of a name."""
        return _mapped(self._path(name))

    def remove(self, name: str) -> None:
        self._path(name).unlink()

    def write(self, blocks: Iterable[Block]) -> Examples:
        """Writes blocks of rows and maps them."""
        with self.growing("input_ids", np.int32) as ids, self.growing("labels", np.int32) as labels:
            offsets, trained = write_blocks(blocks, ids, labels)
        self.save("offsets", offsets)
        self.save("trained", trained)
        return Examples(columns=Columns(*map(self.mapped, Columns._fields)))

    def finish(self, about: dict) -> None:
        """Writes the rest of an entry."""
        paths = sorted(self.directory.glob("*.npy"))
        columns = {path.stem: _mapped(path) for path in paths}
        sizes = {n: [len(c), checksum(c), c.dtype.str] for n, c in columns.items()}
        for path in paths:
            fsync_path(path)
        text = json.dumps({"columns": sizes, "about": about})
        whole = json.dumps({"checksum": digest_of(text), "text": text})
        atomic_write(self.directory / _ABOUT, whole.encode())

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npy"


def _header(dtype, count: int) -> bytes:
    """The header of an .npy file of a flat array, `_HEADER` bytes long."""
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
              "shape": (count,)}  # fmt: skip
    magic = np.lib.format.magic(1, 0)
    size = _HEADER - len(magic) - 2
    return magic + size.to_bytes(2, "little") + (repr(fields).ljust(size - 1) + "\n").encode()


def _mapped(path: Path) -> np.ndarray:
    # A plain view of the map: slices of `np.memmap` cost ten times as much.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _open(entry: Path) -> Entry:
    """Maps an entry; a ValueError says what is damaged."""
    stored = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
    if digest_of(stored["text"]) != stored["checksum"]:
        raise ValueError(f"{_ABOUT} is not what was written")
    found, columns, checksums = json.loads(stored["text"]), {}, {}
    for name, (count, crc, dtype) in found["columns"].items():
        path = entry / f"{name}.npy"
        with path.open("rb") as file:
            header = file.read(_HEADER)
        if header != _header(dtype, count) or _data_crc(path) != crc:
            raise ValueError(f"{name}.npy is not what was written")
        columns[name], checksums[name] = _mapped(path), crc
        if len(columns[name]) != count:
            raise ValueError(f"{name}.npy has another number of items than was written")
    return Entry(columns, checksums, found["about"])


def _data_crc(path: Path) -> int:
    """crc32 of a column's file without its header, by reading: a map would count as memory."""
    crc = 0
    with path.open("rb") as file:
        file.seek(_HEADER)
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def report_of(kind: Callable[..., Report], fields: dict) -> Report:
    """A report from its fields as JSON gives them back."""

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    values = {name: tuples(value) for name, value in fields.items()}
    for name in values.keys() & {"lengths", "completion_lengths"}:
        values[name] = {int(percent): n for percent, n in values[name].items()}
    return kind(**values)


def cache_key(rows_key: str | None, tokenizer, *others: Any) -> str | None:
    """The key of tokenised rows; None if the content of rows or tokenizer is not known.

    Args:
      rows_key: identifies the rows.
      others: all else that the tokens depend on, as JSON types and dataclasses of them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or rows_key is None:
        return None
    template = tokenizer.chat_template
    dated = "strftime_now" in repr(template)  # the text depends on the day
    return digest_of(
        [
            rows_key,
            backend.to_str(),
            template,
            tokenizer.special_tokens_map,
            type(tokenizer).__name__,
            [
                dataclasses.asdict(it) if hasattr(it, "__dataclass_fields__") else it
                for it in others
            ],
            datetime.date.today().isoformat() if dated else "",
            _code(),
        ]
    )


@cache
def _code() -> str:
    """A digest of the versions and the code that make tokens of rows."""
    import jinja2
    import tokenizers
    import transformers

    versions = [module.__version__ for module in (relax, transformers, tokenizers, jinja2, np)]
    return digest_of([versions, files_key(sorted(Path(__file__).parent.rglob("*.py")))])
