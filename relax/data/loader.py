"""The loader: batches whose order is a function of (seed, epoch, position) alone."""

from collections.abc import Iterator, Sequence

import numpy as np

from relax.data.batching import bucket_lengths, collate
from relax.data.examples import IGNORE, Encoded, Examples
from relax.data.packing import Segment, pack
from relax.errors import ConfigError, DataError


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(num_rows)` that depends on (seed, epoch) alone.

    It sorts the raw 64-bit words of numpy's PCG64, because numpy keeps the raw stream of a bit
    generator (and `SeedSequence`) the same in every version and on every machine; it does not
    promise that for `Generator.permutation`.

    >>> sorted(epoch_order(5, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4]
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(words, kind="stable")


class RowBatches:
    """Batches of `rows`, ordered by (seed, epoch, position); a subclass makes a batch of them."""

    rows: list

    def __init__(self, batch_size: int, seed: int, shuffle: bool):
        if batch_size < 1 or seed < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}."
            )
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one epoch from position `start`; earlier ones are never made."""
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = epoch_order(len(self.rows), self.seed, epoch)
        for position in range(start, len(self)):
            first = position * self.batch_size
            yield self._batch(order[first : first + self.batch_size])

    def _batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        raise NotImplementedError


class DataLoader(RowBatches):
    """Batches of `batch_size` rows, resumable at any position without reading the earlier ones.

    A row is one example or, with packing, several; packing is done once, in the given order, and
    packed rows are shuffled. A row without a trained token (a piece of a long prompt) is dropped
    and counted in `num_dropped_rows`. The last batch of an epoch is filled with empty rows, which
    keep the shape and have no loss.

    Args:
      examples: tokenised rows, each with at least one trained token.
      batch_size: rows per update (per-device batch size times accumulation steps).
      seed: seed of the order, >= 0.
      shuffle: a new order each epoch; False keeps the given one.
      packing: None, or a strategy of `relax.data.packing`.
      max_length: tokens per packed row, or the maximum of an example without packing.
      max_buckets: maximum number of batch lengths without packing.
      pad_to_multiple_of: batch lengths are multiples of it.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        packing: str | None = None,
        max_length: int | None = None,
        max_buckets: int = 4,
        pad_to_multiple_of: int = 8,
    ):
        super().__init__(batch_size, seed, shuffle)
        self.examples = examples if isinstance(examples, Examples) else Examples(examples)
        rows = _pack_rows(self.examples, packing, max_length)
        trained = _trained_tokens(self.examples, rows)
        self.rows = [row for row, count in zip(rows, trained, strict=True) if count]
        self.num_dropped_rows = len(rows) - len(self.rows)
        if not self.rows:
            raise DataError(f"none of {len(rows)} rows has a trained token.")
        self.num_trained_tokens = sum(trained)  # per epoch
        self.row_lengths = np.array([sum(s.stop - s.start for s in row) for row in self.rows])
        # Nearly all packed rows are full, so one length is enough.
        buckets = 1 if packing else max_buckets
        self.bucket_lengths = bucket_lengths(self.row_lengths.tolist(), buckets, pad_to_multiple_of)

    def _batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        longest = self.row_lengths[chosen].max()
        rows = [[self._piece(segment) for segment in self.rows[row]] for row in chosen]
        empty: list[list[Encoded]] = [[]] * (self.batch_size - len(rows))
        return collate(rows + empty, next(n for n in self.bucket_lengths if n >= longest))

    def _piece(self, segment: Segment) -> Encoded:
        input_ids, labels = self.examples[segment.document]
        return Encoded(
            input_ids[segment.start : segment.stop], labels[segment.start : segment.stop]
        )

    @property
    def num_tokens(self) -> int:
        """Tokens per epoch, padding not counted."""
        return int(self.row_lengths.sum())

    @property
    def fill(self) -> float:
        """Fraction of tokens that are not padding if every row is padded to the longest."""
        return self.num_tokens / (len(self.rows) * int(self.row_lengths.max()))


def _pack_rows(examples: Examples, packing: str | None, max_length: int | None):
    lengths = examples.lengths
    if not len(lengths) or not lengths.sum():
        raise DataError("a loader needs at least one example with a token, got none.")
    if max_length is not None and packing in (None, "bfd") and lengths.max() > max_length:
        raise DataError(
            f"example {int(lengths.argmax())} has {lengths.max()} tokens, max_length={max_length}: "
            "truncate it first (prepare does), or pack with bfd_split."
        )
    if not packing:
        return [[Segment(i, 0, int(length))] for i, length in enumerate(lengths) if length]
    if max_length is None:
        raise ConfigError("packing needs max_length, the number of tokens of a packed row.")
    return pack(lengths, max_length, packing)


def _trained_tokens(examples: Examples, rows: list[list[Segment]]) -> list[int]:
    """Trained tokens per row; the first token of a piece has no context and does not count."""
    before = np.concatenate([[0], np.cumsum(examples.labels != IGNORE)])
    offsets = examples.offsets
    return [
        sum(
            int(before[offsets[i] + stop] - before[offsets[i] + start + 1])
            for i, start, stop in row
        )
        for row in rows
    ]
