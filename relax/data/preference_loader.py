"""Batches of preferences, ordered by (seed, epoch, position).

Two layouts. In the plain one a row is a prompt, computed once, and its two completions. In the
packed one a row holds several pairs, each as two documents, prompt + chosen and prompt + rejected:
no padding between pairs, and attention kernels for packed rows apply, but prompts count twice.

Axes: B rows, L tokens of a prompt, C tokens of a completion, T tokens of a packed row, K pairs of
a packed row.
"""

import numpy as np

from relax.data.batching import collate, round_up
from relax.data.examples import IGNORE, Encoded
from relax.data.loader import RowBatches
from relax.data.packing import pack
from relax.data.preference import Preference, Preferences
from relax.errors import ConfigError


class PreferenceLoader(RowBatches):
    """Batches of `batch_size` rows; the last of an epoch is filled with empty ones.

    A plain batch holds `prompt_ids` [B, L], `prompt_lengths` [B], `completion_ids` [B, 2, C] and
    `completion_lengths` [B, 2], chosen completions first. A packed one holds `input_ids`, `labels`,
    `positions` and `segment_ids` [B, T], the documents of pair k being segments 2k + 1 and 2k + 2,
    and `completion_lengths` [B, K, 2]. Empty pairs have completions of length 0. Both hold `index`,
    the pair's index in the data set (-1: none), and `mean_chosen_length`, a number for each row;
    unpaired ones also `is_desirable`; those with margins `margin`; and `ref_logprobs` [..., 2] if
    the loader has them.

    Args:
      preferences: result of `prepare_preferences`.
      batch_size: rows per update (per-device batch size times accumulation steps).
      seed: seed of the order, >= 0.
      shuffle: a new order each epoch; False keeps the given one.
      packed_length: T of the packed layout, room for the longest pair; None: the plain layout.
      max_buckets: maximum number of shapes of plain batches.
      pad_to_multiple_of: lengths are multiples of it.

    Attributes:
      ref_logprobs: `[N, 2]` float32, reference logprobs of each pair's completions; None: the
        trainer computes them.
    """

    def __init__(
        self,
        preferences: Preferences,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        packed_length: int | None = None,
        max_buckets: int = 4,
        pad_to_multiple_of: int = 8,
    ):
        super().__init__(batch_size, seed, shuffle)
        self.preferences, self.packed_length = preferences, packed_length
        self.ref_logprobs: np.ndarray | None = None
        sizes = [(len(p.prompt), max(len(p.chosen), len(p.rejected))) for p in preferences.items]
        self.longest_row = max(map(sum, sizes))
        if packed_length is not None:
            doubles = [sum(map(len, p[:3])) + len(p.prompt) for p in preferences.items]
            if max(doubles) > packed_length:
                raise ConfigError(
                    f"a packed row must have room for the longest pair, {max(doubles)} tokens with "
                    f"the prompt twice, got {packed_length}."
                )
            packed = pack(doubles, packed_length)
            self.rows = [[segment.document for segment in row] for row in packed]
            self.pairs_per_row = max(map(len, self.rows))
            self.num_tokens = sum(doubles)
        else:
            self.rows = [[i] for i in range(len(preferences))]
            self.buckets = _buckets(sizes, max_buckets, pad_to_multiple_of)

    @property
    def fill(self) -> float | None:
        """Fraction of packed rows that is not padding; None in the plain layout."""
        if self.packed_length is None:
            return None
        return self.num_tokens / (len(self.rows) * self.packed_length)

    def _batch(self, chosen: np.ndarray, places: np.ndarray | None) -> dict[str, np.ndarray]:
        rows = [self.rows[i] for i in chosen]
        batch = self._arrays(rows + [[]] * (self.batch_size - len(rows)))
        return batch if places is None else {n: array[places] for n, array in batch.items()}

    def _arrays(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        items = self.preferences.items
        packs = self.packed_length is not None
        index = np.full((len(rows), self.pairs_per_row if packs else 1), -1, np.int32)
        for i, row in enumerate(rows):
            index[i, : len(row)] = row
        index = index if packs else index[:, 0]  # [B, K] or [B]
        chosen = [[items[i] for i in row] for row in rows]
        if self.packed_length is not None:
            batch = _packed(chosen, self.packed_length, self.pairs_per_row)
        else:
            longest = [row[0] for row in chosen if row]
            L, C = next(
                (L, C)
                for L, C in self.buckets
                if all(len(p.prompt) <= L and max(map(len, p[1:3])) <= C for p in longest)
            )
            batch = _plain(chosen, L, C)
        lengths = [len(p.chosen) for row in chosen for p in row]
        batch["mean_chosen_length"] = np.full(len(rows), np.mean(lengths), np.float32)
        batch["index"] = index
        if not self.preferences.is_paired:
            labels = np.array([item.is_desirable for item in items])
            batch["is_desirable"] = np.where(index >= 0, labels[index], False)
        if self.preferences.has_margins:
            margins = np.array([item.margin for item in items], np.float32)
            batch["margin"] = np.where(index >= 0, margins[index], np.float32(0))
        if self.ref_logprobs is not None:
            batch["ref_logprobs"] = np.where(
                (index >= 0)[..., None], self.ref_logprobs[index], np.float32(0)
            )
        return batch


def _buckets(sizes: list[tuple[int, int]], max_buckets: int, multiple: int):
    """Bucket lengths of prompts and completions: the maximum, its half, its quarter, ..."""
    longest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    return sorted(
        {
            tuple(round_up(-(-length // 2**k), multiple) for length in longest)
            for k in range(max_buckets)
        }
    )


def _plain(rows: list[list[Preference]], L: int, C: int) -> dict[str, np.ndarray]:
    B = len(rows)
    batch = {
        "prompt_ids": np.zeros((B, L), np.int32),
        "prompt_lengths": np.ones(B, np.int32),  # also for an empty row: attention needs a token
        "completion_ids": np.zeros((B, 2, C), np.int32),
        "completion_lengths": np.zeros((B, 2), np.int32),
    }
    for i, pair in ((i, row[0]) for i, row in enumerate(rows) if row):
        batch["prompt_ids"][i, : len(pair.prompt)] = pair.prompt
        batch["prompt_lengths"][i] = len(pair.prompt)
        for j, completion in enumerate((pair.chosen, pair.rejected)):
            batch["completion_ids"][i, j, : len(completion)] = completion
            batch["completion_lengths"][i, j] = len(completion)
    return batch


def _packed(rows: list[list[Preference]], length: int, K: int) -> dict[str, np.ndarray]:
    documents = [
        [
            _document(pair.prompt, completion)
            for pair in row
            for completion in (pair.chosen, pair.rejected)
        ]
        for row in rows
    ]
    batch = collate(documents, length)
    batch["completion_lengths"] = np.zeros((len(rows), K, 2), np.int32)
    for i, row in enumerate(rows):
        for k, pair in enumerate(row):
            batch["completion_lengths"][i, k] = len(pair.chosen), len(pair.rejected)
    return batch


def _document(prompt: np.ndarray, completion: np.ndarray) -> Encoded:
    labels = np.concatenate([np.full(len(prompt), IGNORE, np.int32), completion])
    return Encoded(np.concatenate([prompt, completion]), labels)
