"""Tokenised rows in a few flat arrays, not in a million small ones."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

IGNORE = -100  # label of a token without a loss


class Encoded(NamedTuple):
    """One document: input tokens and labels, aligned as in Hugging Face."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32: the token itself if it is trained, else IGNORE


class Examples(Sequence):
    """A sequence of `Encoded` over flat arrays; `examples[i]` is a view, not a copy."""

    def __init__(self, rows: Iterable = ()):
        # One pass, one growing buffer per column: rows may come from a generator.
        ids, labels, ends = bytearray(), bytearray(), [0]
        for input_ids, row_labels in rows:
            row_ids = np.asarray(input_ids, np.int32)
            row_labels = np.asarray(row_labels, np.int32)
            if row_ids.ndim != 1 or row_ids.shape != row_labels.shape:
                raise ValueError(
                    "input_ids and labels of a row must be lists of the same length, "
                    f"got shapes {row_ids.shape} and {row_labels.shape}."
                )
            ids += row_ids.tobytes()
            labels += row_labels.tobytes()
            ends.append(ends[-1] + len(row_ids))
        self.input_ids = np.frombuffer(ids, np.int32)
        self.labels = np.frombuffer(labels, np.int32)
        self.offsets = np.asarray(ends, np.int64)

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
