"""Truncates, drops and counts tokenised rows, many at a time."""

import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from relax.data.ahead import ahead, in_lists
from relax.data.examples import IGNORE, Block, Draft
from relax.data.formats import FormatOptions
from relax.data.reading import Rows
from relax.errors import DataError

_BLOCK = 1000  # rows at a time
_LAST = 3  # trained tokens among which an end token is looked for


class _Flat(NamedTuple):
    """Rows one behind the other: tokens, labels, and the ends of each row."""

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    def counts(self, flags: np.ndarray) -> np.ndarray:
        """How many tokens of each row have a flag."""
        before = np.concatenate([[0], np.cumsum(flags)])
        return before[self.stops] - before[self.starts]


class Truncator:
    """Makes blocks of drafts, without the rows that are dropped.

    Args:
      rows: the rows of the drafts, for messages.
      options: of encoding.
      vocab_size: rows of the model's embedding; None: not checked.
      ending_tokens: those that may end a text.

    Attributes:
      lengths: tokens of each row before truncation.
      kept: the indices of rows that are kept.
      dropped: number of dropped rows, by reason.
      truncated, endless: number of truncated rows, and of those without a trained end token.
    """

    def __init__(
        self, rows: Rows, options: FormatOptions, vocab_size: int | None, ending_tokens: set[int]
    ):
        self.rows, self.options, self.vocab_size = rows, options, vocab_size
        self.ending_tokens = ending_tokens
        self.dropped: Counter[str] = Counter()
        self.truncated = self.endless = 0
        self.lengths = array.array("q")
        self.kept = array.array("q")

    def keep(self, drafts: Iterable[Draft]) -> Iterator[Block]:
        """Yields blocks of the rows that are kept; the next drafts are made meanwhile."""
        for some in ahead(in_lists(drafts, _BLOCK)):
            yield self._block(some, len(self.lengths))

    def _block(self, drafts: Sequence[Draft], first: int) -> Block:
        lengths = np.array([len(draft.input_ids) for draft in drafts], np.int64)
        stops = np.cumsum(lengths)
        ids, labels = (np.concatenate([draft[column] for draft in drafts]) for column in (0, 1))
        flat = _Flat(ids, labels, stops - lengths, stops)
        self._check(flat, first)
        self.lengths.frombytes(lengths.tobytes())
        filled = lengths > 0
        labels[flat.starts[filled]] = IGNORE  # the first token has no context
        had_some = flat.counts(labels != IGNORE) > 0
        flat, is_kept = self._cut(flat, drafts, first)
        trained = flat.counts(flat.labels != IGNORE)
        empty = is_kept & (trained == 0)
        self._drop("no trained token within max_length", int((empty & had_some).sum()))
        self._drop("no trained token", int((empty & ~had_some).sum()))
        is_kept &= trained > 0
        self.truncated += int((is_kept & (flat.lengths < lengths)).sum())
        self.endless += int((is_kept & ~self._ends(flat)).sum())
        self.kept.extend((first + np.flatnonzero(is_kept)).tolist())
        if not is_kept.all():
            of_kept = np.repeat(is_kept, flat.lengths)
            flat = flat._replace(ids=flat.ids[of_kept], labels=flat.labels[of_kept])
        return Block(flat.ids, flat.labels, flat.lengths[is_kept], trained[is_kept])

    def _drop(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += count

    def _check(self, flat: _Flat, first: int) -> None:
        ids, labels = flat.ids, flat.labels

        def where(token: int) -> str:
            return self.rows.origin(first + int(np.searchsorted(flat.stops, token, side="right")))

        wrong = np.flatnonzero((ids < 0) | (ids >= (self.vocab_size or np.inf)))
        wrong_labels = np.flatnonzero((labels != IGNORE) & (labels != ids))
        if len(wrong):
            raise DataError(
                f"{where(wrong[0])}: token id {ids[wrong[0]]} is outside of the model's embedding "
                f"of {self.vocab_size} rows: is the tokenizer this model's?"
            )
        if len(wrong_labels):
            raise DataError(
                f"{where(wrong_labels[0])}: label {labels[wrong_labels[0]]} is neither the token "
                "at its place nor -100: labels must not be shifted; each is at its own token."
            )

    def _cut(self, flat: _Flat, drafts: Sequence[Draft], first: int) -> tuple[_Flat, np.ndarray]:
        """The rows within `max_length`, and which of them are kept; the others are empty."""
        limit, is_kept = self.options.max_length, np.ones(len(drafts), bool)
        if limit is None or flat.lengths.max() <= limit:
            return flat, is_kept
        stays = np.ones(len(flat.ids), bool)
        for row in np.flatnonzero(flat.lengths > limit):
            part = self._part(drafts[int(row)], first + int(row), limit)
            start, stop = int(flat.starts[row]), int(flat.stops[row])
            stays[start:stop] = False
            if part is None:
                is_kept[row] = False
            else:
                stays[start + part.start : start + part.stop] = True
        lengths = flat.counts(stays)
        stops, ids, labels = np.cumsum(lengths), flat.ids[stays], flat.labels[stays]
        starts = stops - lengths
        labels[starts[lengths > 0]] = IGNORE
        return _Flat(ids, labels, starts, stops), is_kept

    def _part(self, draft: Draft, row: int, limit: int) -> slice | None:
        """What is kept of a row that is too long; None: nothing."""
        length, mode = len(draft.input_ids), self.options.truncation_mode
        if mode == "error":
            raise DataError(
                f"{self.rows.origin(row)}: the row has {length} tokens, max_length={limit}: raise "
                "max_length, or choose a truncation_mode that cuts or drops."
            )
        if mode == "drop":
            self._drop("longer than max_length", 1)
            return None
        if mode == "turns":
            end = max((end for end in draft.turn_ends if end <= limit), default=0)
            if not end:
                self._drop("no whole turn within max_length", 1)
                return None
            return slice(0, end)
        return slice(0, limit) if mode == "keep_start" else slice(length - limit, length)

    def _ends(self, flat: _Flat) -> np.ndarray:
        """Whether one of the last trained tokens of each row is an end token.

        Templates may write a line break after the end token and mark both.
        """
        is_trained = flat.labels != IGNORE
        before = np.concatenate([[0], np.cumsum(is_trained)])
        starts, stops = before[flat.starts], before[flat.stops]
        is_end = np.isin(flat.labels[is_trained], [*self.ending_tokens])
        found = np.zeros(len(starts), bool)
        for back in range(1, _LAST + 1):
            places = stops - back
            exists = places >= starts
            found[exists] |= is_end[places[exists]]
        return found
