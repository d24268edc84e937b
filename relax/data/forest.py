"""Packs trees, each a root segment and its children, into rows that compute real tokens only.

Axes: B rows, T tokens of a row, N children of all trees, C tokens of the longest child.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Tree = tuple[Sequence[int], Sequence[Sequence[int]]]  # a root's tokens and its children's


class Forest(NamedTuple):
    """Packed rows, and where the children's tokens are.

    Attributes:
      rows: `input_ids, positions, segment_ids, parent_ids`, each `[B, T]` int32. Segment 0 is
        padding, parent 0 none; a child's positions continue from its root's.
      predictor: `[N, C]` int32, the flat place in B * T of the token before each child's token.
      mask: `[N, C]` bool, true for real tokens that have a token before them.
    """

    rows: dict[str, np.ndarray]
    predictor: np.ndarray
    mask: np.ndarray


def pack_forest(trees: Sequence[Tree], row_length: int, shards: int = 1) -> Forest:
    """Packs trees by best fit, the longest first; a root is repeated where its tree is too long.

    B is `shards` times a power of two; shard s has the s-th B / shards rows.

    Args:
      trees: roots, which may be empty, with one child or more each, which may be empty too.
      row_length: T (>= 1).
      shards: parts of equal numbers of rows, among which real tokens are balanced (>= 1).

    Raises:
      ValueError: a tree has no child, or a root with one of its children is longer than a row.
    """
    pieces = sorted(_pieces(trees, row_length), key=lambda piece: -piece[0])
    bins: list[tuple[int, list]] = []
    for size, *piece in pieces:
        fits = [i for i, (used, _) in enumerate(bins) if used + size <= row_length]
        if fits:
            best = max(fits, key=lambda i: bins[i][0])
            bins[best] = (bins[best][0] + size, [*bins[best][1], piece])
        else:
            bins.append((size, [piece]))
    per_shard = 1
    while per_shard * shards < len(bins):
        per_shard *= 2
    dealt = _deal(bins, per_shard, shards)
    return _lay(trees, dealt, per_shard * shards, row_length)


def _pieces(trees: Sequence[Tree], T: int) -> list[tuple[int, int, list]]:
    """(tokens, tree, numbered children) of whole trees, or of parts that fit."""
    pieces, number = [], 0
    members: list[tuple[int, Sequence[int]]]
    for tree, (root, children) in enumerate(trees):
        if not children:
            raise ValueError(
                f"a tree must have at least one child, tree {tree} has a root of {len(root)} "
                "tokens alone. Make it the child of an empty root."
            )
        used, members = len(root), []
        for child in children:
            if len(root) + len(child) > T:
                raise ValueError(
                    f"a root and one child must fit into a row: tree {tree} has a root of "
                    f"{len(root)} tokens and a child of {len(child)}, a row {T}. Pass a "
                    "row_length of at least their sum, or shorten them."
                )
            if used + len(child) > T:
                pieces.append((used, tree, members))
                used, members = len(root), []
            used += len(child)
            members.append((number, child))
            number += 1
        if members:
            pieces.append((used, tree, members))
    return pieces


def _deal(bins, per_shard, shards):
    """(row, pieces) of each bin: the fullest first, to the shard with the fewest tokens."""
    tokens, counts, dealt = [0] * shards, [0] * shards, []
    for used, pieces in sorted(bins, key=lambda one: -one[0]):
        open_shards = [s for s in range(shards) if counts[s] < per_shard]
        shard = min(open_shards, key=lambda s: tokens[s])
        dealt.append((shard * per_shard + counts[shard], pieces))
        tokens[shard] += used
        counts[shard] += 1
    return dealt


def _lay(trees, dealt, B, T):
    names = ("input_ids", "positions", "segment_ids", "parent_ids")
    rows = {name: np.zeros((B, T), np.int32) for name in names}
    lengths = [len(child) for _, children in trees for child in children]
    predictor = np.zeros((len(lengths), max(lengths, default=0)), np.int32)
    mask = np.zeros(predictor.shape, bool)

    def write(row, start, ids, first, segment, parent):
        place = (row, slice(start, start + len(ids)))
        positions = np.arange(first, first + len(ids))
        for name, value in zip(names, (ids, positions, segment, parent), strict=True):
            rows[name][place] = value
        return start + len(ids)

    for row, pieces in dealt:
        stop, segment = 0, 0
        for tree, members in pieces:
            root = trees[tree][0]
            segment += 1
            parent = segment if len(root) else 0
            stop = write(row, stop, root, 0, segment, 0)
            last = row * T + stop - 1
            for number, child in members:
                segment += 1
                n, start = len(child), row * T + stop
                stop = write(row, stop, child, len(root), segment, parent)
                if n:
                    predictor[number, :n] = [last, *range(start, start + n - 1)]
                    mask[number, :n] = True
                    if not len(root):
                        predictor[number, 0], mask[number, 0] = 0, False
    return Forest(rows, predictor, mask)
