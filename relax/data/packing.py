"""Packing: assigns pieces of documents to rows. Pure functions of lengths."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from relax.errors import ConfigError

STRATEGIES = ("bfd", "bfd_split", "wrapped")
_BLOCK = 2**16  # pieces of which Python numbers are made at a time


class Segment(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of document number `document`."""

    document: int
    start: int
    stop: int


class Pieces(NamedTuple):
    """The document, the start and the stop of each piece, int32."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class PackedRows(Sequence):
    """Rows of pieces of documents, in four flat arrays; `rows[i]` is a list of `Segment`.

    Attributes:
      pieces: row by row.
      offsets: int64, where the pieces of each row begin, and the end of the last one.
    """

    def __init__(self, pieces: Pieces, offsets: np.ndarray):
        self.pieces, self.offsets = pieces, offsets

    @classmethod
    def joined(cls, parts: Sequence["PackedRows"], starts: Sequence[int]) -> "PackedRows":
        """The rows of several parts, whose documents are numbered from `starts` on."""
        documents = [
            part.pieces.document + np.int32(start)
            for part, start in zip(parts, starts, strict=True)
        ]
        begins, stops = ([part.pieces[i] for part in parts] for i in (1, 2))
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(Pieces(*map(np.concatenate, (documents, begins, stops))), _offsets(counts))

    @property
    def documents(self) -> np.ndarray:
        """The first document of each row."""
        return self.pieces.document[self.offsets[:-1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, last = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        columns = (column[first:last].tolist() for column in self.pieces)
        return [Segment(*piece) for piece in zip(*columns, strict=True)]

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.sums(self.pieces.stop - self.pieces.start)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some rows, by their indices."""
        return self._lengths[rows]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over each row of a number for each piece, int64."""
        return np.diff(_offsets(values)[self.offsets])

    def select(self, rows: np.ndarray) -> "PackedRows":
        """Some of the rows."""
        counts = np.diff(self.offsets)[rows]
        offsets = _offsets(counts)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return PackedRows(Pieces(*(column[places] for column in self.pieces)), offsets)


def pack(lengths, max_length: int, strategy: str = "bfd") -> PackedRows:
    """Assigns documents to rows of at most `max_length` tokens.

    `bfd` is best-fit decreasing: the longest document first (ties in input order), each into the
    fullest row that still has room (the oldest of equals), else into a new row; longer documents
    are truncated on the right. `bfd_split` first splits long documents into pieces of `max_length`.
    `wrapped` concatenates everything and cuts it every `max_length` tokens. Empty documents take
    no place. Rows are in the order in which they were opened.

    Args:
      lengths: tokens per document, >= 0.
      max_length: tokens per row, >= 1.
      strategy: one of `STRATEGIES`.

    Returns:
      The segments of each row.

    Raises:
      ConfigError: if `max_length` or `strategy` is out of range.

    >>> pack([5, 2, 3, 1], 4)[1]
    [Segment(document=2, start=0, stop=3), Segment(document=3, start=0, stop=1)]
    """
    if max_length < 1:
        raise ConfigError(f"a packed row needs at least one token, got max_length={max_length}.")
    lengths = np.asarray(lengths, np.int64)
    if strategy == "wrapped":
        return _wrap(lengths, max_length)
    filled = np.flatnonzero(lengths > 0)
    if strategy == "bfd":
        documents, starts = filled, np.zeros(len(filled), np.int64)
        stops = np.minimum(lengths[filled], max_length)
    elif strategy == "bfd_split":
        counts = -(-lengths[filled] // max_length)
        documents = np.repeat(filled, counts)
        starts = (np.arange(len(documents)) - np.repeat(_offsets(counts)[:-1], counts)) * max_length
        stops = np.minimum(starts + max_length, lengths[documents])
    else:
        raise ConfigError(f"unknown packing strategy {strategy!r}: use one of {STRATEGIES}.")
    order = np.argsort(starts - stops, kind="stable")  # longest first
    rows = _best_fit(_numbers((stops - starts)[order]), max_length)
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    return _packed(documents[order], starts[order], stops[order], rows[by_row])


def _best_fit(lengths: Iterable[int], max_length: int) -> np.ndarray:
    """The row of each piece, int32: the fullest with room for it, the oldest of equals."""
    # Open rows by free space, in queues that are linked by `behind`, and the sorted free spaces:
    # a search per piece is logarithmic in their number, which is at most max_length.
    heads: dict[int, int] = {}
    tails: dict[int, int] = {}
    behind, rows = array("i"), array("i")
    spaces: list[int] = []
    for length in lengths:
        found = bisect_left(spaces, length)
        if found == len(spaces):
            row, space = len(behind), max_length
            behind.append(-1)
        else:
            space = spaces[found]
            row = heads[space]
            if behind[row] < 0:
                del heads[space], spaces[found]
            else:
                heads[space], behind[row] = behind[row], -1
        rows.append(row)
        left = space - length
        if not left:
            continue
        if left in heads:
            behind[tails[left]] = row
        else:
            heads[left] = row
            insort(spaces, left)
        tails[left] = row
    return np.frombuffer(rows, np.int32)


def _wrap(lengths: np.ndarray, max_length: int) -> PackedRows:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    stops = np.union1d(ends[lengths > 0], np.arange(max_length, total, max_length))
    starts = np.concatenate([np.zeros(min(len(stops), 1), np.int64), stops[:-1]])
    documents = np.searchsorted(ends, starts, side="right")
    begins = (ends - lengths)[documents]
    return _packed(documents, starts - begins, stops - begins, starts // max_length)


def _packed(documents, starts, stops, rows: np.ndarray) -> PackedRows:
    """Rows of pieces, which are in the order of their rows; none is without a piece."""
    pieces = Pieces(*(column.astype(np.int32) for column in (documents, starts, stops)))
    return PackedRows(pieces, _offsets(np.bincount(rows)))


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _numbers(values: np.ndarray) -> Iterator[int]:
    for first in range(0, len(values), _BLOCK):
        yield from values[first : first + _BLOCK].tolist()
