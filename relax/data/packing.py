"""Packing: assigns pieces of documents to rows. Pure functions of lengths."""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from typing import NamedTuple

from relax.errors import ConfigError

STRATEGIES = ("bfd", "bfd_split", "wrapped")


class Segment(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of document number `document`."""

    document: int
    start: int
    stop: int


def pack(lengths, max_length: int, strategy: str = "bfd") -> list[list[Segment]]:
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
    if strategy == "wrapped":
        return _wrap(lengths, max_length)
    if strategy == "bfd":
        pieces = [Segment(i, 0, min(int(n), max_length)) for i, n in enumerate(lengths) if n > 0]
    elif strategy == "bfd_split":
        pieces = [
            Segment(i, start, min(start + max_length, int(n)))
            for i, n in enumerate(lengths)
            for start in range(0, int(n), max_length)
        ]
    else:
        raise ConfigError(f"unknown packing strategy {strategy!r}: use one of {STRATEGIES}.")
    return _best_fit_decreasing(pieces, max_length)


def _best_fit_decreasing(pieces: list[Segment], max_length: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    # Open rows by free space, and the sorted free spaces: a search per piece is logarithmic in
    # their number, which is at most max_length.
    rows_with: dict[int, deque[list[Segment]]] = defaultdict(deque)
    spaces: list[int] = []
    row: list[Segment]
    for piece in sorted(pieces, key=lambda p: p.start - p.stop):  # a stable sort, longest first
        length = piece.stop - piece.start
        found = bisect_left(spaces, length)
        if found == len(spaces):
            row, space = [], max_length
            rows.append(row)
        else:
            space = spaces[found]
            row = rows_with[space].popleft()
            if not rows_with[space]:
                del spaces[found]
        row.append(piece)
        left = space - length
        if left:
            if not rows_with[left]:
                insort(spaces, left)
            rows_with[left].append(row)
    return rows


def _wrap(lengths, max_length: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    left = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if left == 0:
                rows.append([])
                left = max_length
            stop = min(start + left, int(length))
            rows[-1].append(Segment(document, start, stop))
            left -= stop - start
            start = stop
    return rows
