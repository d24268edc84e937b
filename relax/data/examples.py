"""Tokenised rows in a few flat arrays, in memory or memory-mapped, not in a million small ones."""

import array
import io
import zlib
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from relax.data.mixing import Mixture

IGNORE = -100  # label of a token without a loss
_BLOCK = 2**20  # items of an array per step of its checksum


class Encoded(NamedTuple):
    """One document: input tokens and labels, aligned as in Hugging Face."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32: the token itself if it is trained, else IGNORE


class Draft(NamedTuple):
    """A row before truncation.

    Attributes:
      input_ids, labels: as in `Encoded`.
      turn_ends: the number of tokens up to the end of each assistant's turn, where it is needed.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    turn_ends: Sequence[int] = ()


class Block(NamedTuple):
    """Rows one behind the other, as in `Columns`, with the numbers of their tokens."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray


class Columns(NamedTuple):
    """The flat arrays of rows.

    Attributes:
      input_ids, labels: int32, all rows one behind the other.
      offsets: int64, where each row begins, and the end of the last one.
      trained: int32, tokens of each row that have a label and a token before them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray


class Examples(Sequence):
    """A sequence of `Encoded` over flat arrays; `examples[i]` is a view, not a copy.

    Args:
      rows: pairs of tokens and labels; one pass is made, so they may come from a generator.
      columns: the arrays of such rows, instead of them.
      checksums: their crc32, if they are known.

    Attributes:
      mixture: how they are mixed, where they are of several sources.
    """

    mixture: Mixture | None = None

    def __init__(
        self,
        rows: Iterable = (),
        *,
        columns: Columns | None = None,
        checksums: Sequence[int] | None = None,
    ):
        if columns is None:
            columns = _columns(map(_block, rows))
        self.columns = columns
        self.input_ids, self.labels, self.offsets, self.trained = columns
        self._checksums = None if checksums is None else tuple(checksums)

    @classmethod
    def of_blocks(cls, blocks: Iterable[Block]) -> "Examples":
        """Examples in memory; blocks may come from a generator."""
        return cls(columns=_columns(blocks))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return Encoded(self.input_ids[start:stop], self.labels[start:stop])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64."""
        return np.diff(self.offsets)

    @property
    def checksums(self) -> tuple[int, ...]:
        """The crc32 of each of the columns."""
        if self._checksums is None:
            self._checksums = tuple(map(checksum, self.columns))
        return self._checksums


def _columns(blocks: Iterable[Block]) -> Columns:
    ids, labels = io.BytesIO(), io.BytesIO()  # one growing buffer per column
    offsets, trained = write_blocks(blocks, ids, labels)
    flat_ids = np.frombuffer(ids.getbuffer(), np.int32)
    return Columns(flat_ids, np.frombuffer(labels.getbuffer(), np.int32), offsets, trained)


def _block(row) -> Block:
    """A block of one row; a ValueError if its lists have different lengths."""
    ids, labels = (np.asarray(column, np.int32) for column in row)
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise ValueError(
            "input_ids and labels of a row must be lists of the same length, "
            f"got shapes {ids.shape} and {labels.shape}."
        )
    trained = np.count_nonzero(labels[1:] != IGNORE)
    return Block(ids, labels, np.array([len(ids)]), np.array([trained]))


def write_blocks(
    blocks: Iterable[Block], ids: BinaryIO, labels: BinaryIO
) -> tuple[np.ndarray, np.ndarray]:
    """Writes tokens and labels one behind the other; returns `offsets` and `trained`."""
    lengths, trained = array.array("q"), array.array("i")
    for block in blocks:
        ids.write(block.input_ids.astype(np.int32, copy=False).tobytes())
        labels.write(block.labels.astype(np.int32, copy=False).tobytes())
        lengths.frombytes(block.lengths.astype(np.int64, copy=False).tobytes())
        trained.frombytes(block.trained.astype(np.int32, copy=False).tobytes())
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.frombuffer(lengths, np.int64), out=offsets[1:])
    return offsets, np.frombuffer(trained, np.int32)


def checksum(values: np.ndarray) -> int:
    """The crc32 of an array's bytes, read block by block."""
    crc = 0
    for first in range(0, len(values), _BLOCK):
        crc = zlib.crc32(values[first : first + _BLOCK].tobytes(), crc)
    return crc
