"""Batches of preferences, ordered by (seed, epoch, position).

A batch holds padded arrays, which the trainers pack into rows of real tokens, each prompt once.

Axes: N pairs, L tokens of a prompt, C tokens of a completion.
"""

from collections.abc import Sequence

import numpy as np

from relax.data.batching import bucket
from relax.data.loader import RowBatches
from relax.data.packing import PackedRows, pack
from relax.data.preference import Preference, Preferences
from relax.errors import ConfigError


class PreferenceLoader(RowBatches):
    """Batches of `batch_size` rows; the last of an epoch is filled with empty ones.

    A batch holds `prompt_ids` [N, L], `prompt_lengths` [N], `completion_ids` [N, 2, C] and
    `completion_lengths` [N, 2], chosen completions first. A row is a pair or, with `packed_length`,
    K pairs, of which some are empty: completions and prompt of length 0. A batch also holds
    `index`, the pair's index in the data set (-1: none), and `mean_chosen_length`, the same number
    for each pair; unpaired ones also `is_desirable`; those with margins `margin`;
    `ref_logprobs` [N, 2] if the loader has them; and those of several sources `source_ids` [N],
    0 for empty ones. Pairs of several sources share no row.

    Args:
      preferences: result of `prepare_preferences`.
      batch_size: rows per update (per-device batch size times accumulation steps).
      seed: seed of the order, >= 0.
      shuffle: a new order each epoch; False keeps the given one.
      packed_length: as many pairs share a row as there is room for in so many tokens, with each
        prompt once, room for the longest pair; None: a row is one pair.

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
    ):
        super().__init__(batch_size, seed, shuffle)
        self.preferences, self.packed_length = preferences, packed_length
        self.packed: PackedRows | None = None
        self.ref_logprobs: np.ndarray | None = None
        sizes = preferences.pairs.sizes
        self.longest_row = int((sizes[:, 0] + sizes[:, 1:].max(axis=1)).max())
        self.pairs_per_row = 1
        totals = sizes.sum(axis=1, dtype=np.int64)
        self.num_tokens = int(totals.sum())
        self.mixture = preferences.mixture
        self.rows: Sequence = range(len(preferences))
        if packed_length is None:
            return
        if totals.max() > packed_length:
            raise ConfigError(
                f"a packed row must have room for the longest pair, {totals.max()} tokens, got "
                f"{packed_length}."
            )
        counts = (len(totals),) if self.mixture is None else self.mixture.sizes
        starts = [sum(counts[:i]) for i in range(len(counts))]
        parts = [
            pack(totals[start : start + count], packed_length)
            for start, count in zip(starts, counts, strict=True)
        ]
        self.packed = PackedRows.joined(parts, starts)
        self.rows = self.packed
        if self.mixture is not None:
            self.mixture = self.mixture.kept(self.packed.documents)
        self.pairs_per_row = int(np.diff(self.packed.offsets).max())

    @property
    def fill(self) -> float | None:
        """Fraction of packed rows that is not padding; None without packing."""
        if self.packed_length is None:
            return None
        return self.num_tokens / (len(self.rows) * self.packed_length)

    def _batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        index = np.full((self.batch_size, self.pairs_per_row), -1, np.int32)
        if self.packed is None:
            index[: len(chosen), 0] = chosen
        else:
            for places_of_row, row in zip(index, chosen, strict=False):
                pairs = [piece.document for piece in self.packed[row]]
                places_of_row[: len(pairs)] = pairs
        return self._arrays(index.reshape(-1))

    def _arrays(self, index: np.ndarray) -> dict[str, np.ndarray]:
        items, exists = self.preferences.pairs, index >= 0
        chosen = [items[i] if i >= 0 else None for i in index]
        batch = _padded(chosen) | {"index": index}
        # Without a prompt the first token of a completion is not predicted.
        lengths = batch["completion_lengths"][exists, 0] - (batch["prompt_lengths"][exists] == 0)
        batch["mean_chosen_length"] = np.full(len(index), lengths.mean(), np.float32)
        if not self.preferences.is_paired:
            batch["is_desirable"] = np.where(exists, items.columns.is_desirable[index], False)
        if self.preferences.has_margins:
            margins = items.columns.margin[index].astype(np.float32)
            batch["margin"] = np.where(exists, margins, np.float32(0))
        if self.preferences.mixture is not None:
            sources = self.preferences.mixture.source_of(index)
            batch["source_ids"] = np.where(exists, sources, 0).astype(np.int32)
        if self.ref_logprobs is not None:
            batch["ref_logprobs"] = np.where(
                exists[:, None], self.ref_logprobs[index], np.float32(0)
            )
        return batch


def _padded(pairs: list[Preference | None]) -> dict[str, np.ndarray]:
    some = [pair for pair in pairs if pair is not None]
    L = bucket(max(len(pair.prompt) for pair in some))
    C = bucket(max(len(ids) for pair in some for ids in pair[1:3]))
    N = len(pairs)
    batch = {
        "prompt_ids": np.zeros((N, L), np.int32),
        "prompt_lengths": np.zeros(N, np.int32),
        "completion_ids": np.zeros((N, 2, C), np.int32),
        "completion_lengths": np.zeros((N, 2), np.int32),
    }
    for i, pair in enumerate(pairs):
        if pair is None:
            continue
        batch["prompt_ids"][i, : len(pair.prompt)] = pair.prompt
        batch["prompt_lengths"][i] = len(pair.prompt)
        for j, completion in enumerate((pair.chosen, pair.rejected)):
            batch["completion_ids"][i, j, : len(completion)] = completion
            batch["completion_lengths"][i, j] = len(completion)
    return batch
