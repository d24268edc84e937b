"""Converts rows of documents to the arrays of the compiled step."""

from collections.abc import Iterable, Sequence

import numpy as np

from relax.data.examples import IGNORE, Encoded


def collate(rows: Sequence[Sequence[Encoded]], length: int) -> dict[str, np.ndarray]:
    """Concatenates the documents of each row and pads the row to `length`.

    Padding is identified by its position after the documents, never by its token.

    Args:
      rows: the documents of each row; a row without any is all padding.
      length: tokens per row, at least the longest row's.

    Returns:
      int32 arrays `[rows, length]`: `input_ids` (0 on padding), `labels` (-100 on padding and on
      the first token of each document), `positions` (from 0 in each
      document), `segment_ids` (1, 2, ... per document, 0 on padding).

    >>> batch = collate([[Encoded([5, 6], [5, 6]), Encoded([7, 8], [-100, 8])]], 5)
    >>> batch["labels"].tolist(), batch["segment_ids"].tolist()
    ([[-100, 6, -100, 8, -100]], [[1, 1, 2, 2, 0]])
    """
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "positions", "segment_ids")}
    batch["labels"] = np.full(shape, IGNORE, np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for segment, (input_ids, labels) in enumerate(documents, 1):
            stop = start + len(input_ids)
            if stop > length:
                raise ValueError(f"row {row} holds more than the {length} tokens of the batch.")
            batch["input_ids"][row, start:stop] = input_ids
            batch["labels"][row, start:stop] = labels
            batch["labels"][row, start] = IGNORE
            batch["positions"][row, start:stop] = np.arange(stop - start)
            batch["segment_ids"][row, start:stop] = segment
            start = stop
    return batch


def bucket(length: int, limit: int | None = None) -> int:
    """Rounds a length up to a power of two (>= 8) or to the midpoint between two of them.

    Few distinct lengths mean few compiled programs; at most a third of a row is padding.

    >>> [bucket(n) for n in (1, 8, 9, 13, 17, 100)]
    [8, 8, 12, 16, 24, 128]
    >>> bucket(100, limit=110)
    110
    """
    size = 8
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if limit is None else min(size, limit)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`.

    >>> round_up(9, 8), round_up(8, 8)
    (16, 8)
    """
    return -(-length // multiple) * multiple


def bucket_lengths(lengths: Iterable[int], max_buckets: int = 4, multiple: int = 8) -> list[int]:
    """Chooses a few batch lengths, for each of which the step is compiled.

    The largest is the longest row's, the others its half, quarter, ..., each rounded up to
    `multiple`; lengths that fit no row are omitted.

    >>> bucket_lengths([100, 950, 1020])
    [128, 256, 512, 1024]
    >>> bucket_lengths([9, 11])
    [16]
    """
    lengths = list(lengths)
    shortest, longest = min(lengths), max(lengths)
    halves = {round_up(-(-longest // 2**k), multiple) for k in range(max_buckets)}
    return sorted(length for length in halves if length >= shortest)
