"""The loader: batches whose order is a function of (seed, epoch, position) alone."""

from collections.abc import Iterator, Sequence

import numpy as np

from relax.data.batching import bucket_lengths, collate
from relax.data.examples import IGNORE, Encoded, Examples
from relax.data.mixing import Mixture
from relax.data.order import epoch_order
from relax.data.packing import PackedRows, Segment, pack
from relax.errors import ConfigError, DataError

_BLOCK = 2**16  # rows of a large set that are looked at together


class RowBatches:
    """Batches of `rows`, ordered by (seed, epoch, position); a subclass makes a batch of them.

    Attributes:
      rows: all rows.
      mixture: which of them an epoch has, and from which sources; None: all, from one source.
    """

    rows: Sequence
    mixture: Mixture | None = None

    def __init__(self, batch_size: int, seed: int, shuffle: bool):
        if batch_size < 1 or seed < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}."
            )
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self._rows_per_epoch // self.batch_size)

    @property
    def _rows_per_epoch(self) -> int:
        return len(self.rows) if self.mixture is None else len(self.mixture)

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order."""
        if self.mixture is not None:
            return self.mixture.order(self.seed, epoch, self.shuffle)
        count = len(self.rows)
        return epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one epoch from position `start`; earlier ones are never made."""
        order = self.order(epoch)
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

    With a mixture of several sources, rows are packed source by source, and a batch has their
    indices as `source_ids` `[rows, tokens]`, 0 on padding.

    Args:
      examples: tokenised rows, each with at least one trained token; their `mixture` counts.
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
        self.num_dropped_rows = int((trained == 0).sum())
        self.rows: WholeRows | PackedRows = rows
        if self.num_dropped_rows:
            self.rows = rows.select(np.flatnonzero(trained))
        if not len(self.rows):
            raise DataError(f"none of {len(rows)} rows has a trained token.")
        if (mixture := self.examples.mixture) is not None:
            whole = isinstance(rows, WholeRows) and len(self.rows) == len(self.examples)
            self.mixture = mixture if whole else mixture.kept(self.rows.documents)
        self.num_trained_tokens = int(trained.sum(dtype=np.int64))  # of all rows
        shortest, self.longest_row, self.num_tokens = self._extent()
        # Nearly all packed rows are full, so one length is enough.
        buckets = 1 if packing else max_buckets
        ends = [shortest, self.longest_row]
        self.bucket_lengths = bucket_lengths(ends, buckets, pad_to_multiple_of)

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some rows, by their indices."""
        return self.rows.lengths(rows)

    def _extent(self) -> tuple[int, int, int]:
        """Tokens of the shortest and of the longest row, and of all, some rows at a time."""
        count = len(self.rows)
        blocks = (np.arange(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK))
        lengths = map(self.row_lengths, blocks)
        totals = [(int(n.min()), int(n.max()), int(n.sum())) for n in lengths]
        shortest, longest, total = zip(*totals, strict=True)
        return min(shortest), max(longest), sum(total)

    def _batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        longest = self.row_lengths(chosen).max()
        rows = [[self._piece(segment) for segment in self.rows[row]] for row in chosen]
        empty: list[list[Encoded]] = [[]] * (self.batch_size - len(rows))
        batch = collate(rows + empty, next(n for n in self.bucket_lengths if n >= longest))
        if self.mixture is not None:
            sources = np.zeros((self.batch_size, 1), np.int32)
            sources[: len(chosen), 0] = self.mixture.source_of(chosen)
            batch["source_ids"] = np.where(batch["segment_ids"] > 0, sources, 0)
        return batch

    def _piece(self, segment: Segment) -> Encoded:
        input_ids, labels = self.examples[segment.document]
        return Encoded(
            input_ids[segment.start : segment.stop], labels[segment.start : segment.stop]
        )

    @property
    def fill(self) -> float:
        """Fraction of tokens that are not padding if every row is padded to the longest."""
        return self.num_tokens / (len(self.rows) * self.longest_row)


class WholeRows(Sequence):
    """Rows of one whole document each, without a list of them.

    Args:
      examples: the documents.
      documents: the document of each row; None: all of them.
    """

    def __init__(self, examples: Examples, documents: np.ndarray | None = None):
        self.examples = examples
        self._documents = documents

    @property
    def documents(self) -> np.ndarray:
        """A document of each row."""
        return np.arange(len(self.examples)) if self._documents is None else self._documents

    def __len__(self) -> int:
        return len(self.examples if self._documents is None else self._documents)

    def __getitem__(self, row):
        document = int(row if self._documents is None else self._documents[row])
        start, stop = self.examples.offsets[document : document + 2]
        return [Segment(document, 0, int(stop - start))]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some rows, by their indices."""
        documents, offsets = rows, self.examples.offsets
        if self._documents is not None:
            documents = self._documents[rows]
        return offsets[documents + 1] - offsets[documents]

    def select(self, rows: np.ndarray) -> "WholeRows":
        """Some of the rows."""
        return WholeRows(self.examples, self.documents[rows])


def _pack_rows(
    examples: Examples, packing: str | None, max_length: int | None
) -> WholeRows | PackedRows:
    lengths = examples.lengths
    if not len(lengths) or not lengths.sum():
        raise DataError("a loader needs at least one example with a token, got none.")
    if max_length is not None and packing in (None, "bfd") and lengths.max() > max_length:
        raise DataError(
            f"example {int(lengths.argmax())} has {lengths.max()} tokens, max_length={max_length}: "
            "truncate it first (prepare does), or pack with bfd_split."
        )
    if not packing:
        return WholeRows(examples, None if lengths.all() else np.flatnonzero(lengths))
    if max_length is None:
        raise ConfigError("packing needs max_length, the number of tokens of a packed row.")
    if examples.mixture is None:
        return pack(lengths, max_length, packing)
    sizes = examples.mixture.sizes
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [
        pack(lengths[start : start + size], max_length, packing)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return PackedRows.joined(parts, starts)


def _trained_tokens(examples: Examples, rows: WholeRows | PackedRows) -> np.ndarray:
    """Trained tokens per row; the first token of a piece has no context and does not count."""
    if isinstance(rows, WholeRows):
        return examples.trained if len(rows) == len(examples) else examples.trained[rows.documents]
    documents, starts, stops = rows.pieces
    begins = examples.offsets[documents]
    counts = examples.trained[documents]
    is_part = (starts > 0) | (stops < examples.offsets[documents + 1] - begins)
    for piece in np.flatnonzero(is_part).tolist():
        first = begins[piece]
        labels = examples.labels[first + starts[piece] + 1 : first + stops[piece]]
        counts[piece] = np.count_nonzero(labels != IGNORE)
    return rows.sums(counts)
