"""Packs trees, each a root segment and its children, into rows that compute real tokens only.

A prompt and its completions are a tree: each completion sees the prompt and itself, and the prompt
is computed once. The packer works on the host, and its result depends on its arguments alone.

Axes: B rows, T tokens of a row, N children of all trees.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from relax.data.batching import round_up
from relax.data.examples import IGNORE
from relax.data.packing import pack

Tokens = Sequence[int] | np.ndarray
Tree = tuple[Tokens, Sequence[Tokens]]  # a root's tokens and its children's
NEARLY_FULL = 0.85  # share of real tokens in rows that stay as they are
# Row lengths in eighths of the power of two with room for the longest child and its root. Every
# further length is one more shape to compile for: `_MORE` are tried where `_FEW` fill too little.
_FEW, _MORE = (8, 16, 32), (5, 6, 7, 12)
ENOUGH = 0.75
ROWS = ("input_ids", "positions", "segment_ids", "parent_ids", "previous")


class Forest(NamedTuple):
    """Packed rows, and where the children are.

    Attributes:
      rows: arrays `[B, T]` int32 by the names in `ROWS`. Segment 0 is padding, parent 0 none; a
        child's positions continue from its root's. `previous` is the place, in the same row, of the
        token before a child's token (the root's last one before its first); -1 for roots, padding,
        and a child's first token behind an empty root.
      starts: `[N]` int32, the place of each child's first token among the B / blocks * T tokens of
        its block; the others follow it.
      ends: `[N]` int32, the place of its last token, which is its root's last one for an empty
        child; -1 if root and child are empty, or the tree is not laid out.
    """

    rows: dict[str, np.ndarray]
    starts: np.ndarray
    ends: np.ndarray


def pack_forest(
    trees: Sequence[Tree],
    *,
    blocks: int = 1,
    row_length: int | None = None,
    multiple: int = 1,
    shared: bool = True,
    laid: Sequence[bool] | np.ndarray | None = None,
    enough: float = ENOUGH,
) -> Forest:
    """Packs trees by best fit; a root is repeated where its tree does not fit into a row.

    Every block of B / blocks rows holds an equal number of trees, in the given order, so that
    micro-batches and devices each find their own trees in their own rows. There are few sizes of T
    and of B / blocks, so that few shapes are compiled for; of the row lengths with room for the
    longest child and its root, the one with the least work is taken: a power of two where that
    fills `enough` of the places.

    Args:
      trees: roots, which may be empty, and their children, which may be empty too.
      blocks: a divisor of the number of trees (>= 1).
      row_length: T; None: chosen.
      multiple: a chosen T is a multiple of it (>= 1).
      shared: children of a tree share its root where they are in one row. False repeats the root
        before every child, as one segment with it.
      laid: the trees to lay out; None: all. The others are counted, and take no place.
      enough: share of the places, 0 to 1, below which T may lie between two powers of two.

    Raises:
      ValueError: `blocks` does not divide the trees, or a root with one of its children is longer
        than `row_length`.
    """
    if len(trees) % blocks:
        raise ValueError(
            f"blocks must divide the number of trees, got {blocks} blocks and {len(trees)} trees."
        )
    chosen = [True] * len(trees) if laid is None else laid
    sizes = [
        (len(root), [len(child) for child in children] if wanted else [])
        for (root, children), wanted in zip(trees, chosen, strict=True)
    ]
    longest = max((root + n for root, lengths in sizes for n in lengths), default=1)
    if row_length is not None and longest > row_length:
        raise ValueError(
            f"a row must hold a root and one of its children, got {longest} tokens of the longest "
            f"and {row_length} of a row. Pass a row_length of at least {longest}."
        )
    if row_length is not None:
        return _lay(trees, _layout(sizes, row_length, blocks, shared), blocks, shared)

    def best(eighths: Sequence[int]) -> _Layout:
        lengths = _row_lengths(longest, eighths, multiple)
        layouts = [_layout(sizes, length, blocks, shared) for length in lengths]
        return min(layouts, key=lambda layout: layout.work)

    layout = best(_FEW)
    if layout.fill(blocks) < enough:
        layout = best(_FEW + _MORE)
    return _lay(trees, layout, blocks, shared)


def deal(sizes: Sequence[int], blocks: int) -> np.ndarray:
    """An order of trees in which the blocks have equal numbers of trees and similar sizes.

    Blocks are micro-batches times devices. Where the number of devices is a power of two, it does
    not change which trees are in a micro-batch, as it would a loss that depends on that: the trees
    are dealt by one prime factor after the other, the largest first. Each deal gives the largest
    tree to the part with the fewest tokens so far that has room for a tree.

    >>> deal([9, 1, 8, 2], 2).tolist()
    [0, 1, 2, 3]
    >>> deal([9, 8, 2, 1], 2).tolist()
    [0, 3, 1, 2]
    """
    return np.array(_deal(range(len(sizes)), sizes, blocks), np.int64)


def _deal(trees: Sequence[int], sizes: Sequence[int], blocks: int) -> list[int]:
    if blocks == 1:
        return list(trees)
    parts = _largest_prime_factor(blocks)
    totals = [0] * parts
    members: list[list[int]] = [[] for _ in range(parts)]
    room = len(trees) // parts
    for tree in sorted(trees, key=lambda i: -sizes[i]):
        part = min((p for p in range(parts) if len(members[p]) < room), key=totals.__getitem__)
        totals[part] += sizes[tree]
        members[part].append(tree)
    return [tree for part in members for tree in _deal(sorted(part), sizes, blocks // parts)]


def _largest_prime_factor(n: int) -> int:
    """
    >>> [_largest_prime_factor(n) for n in (2, 6, 8, 15, 24)]
    [2, 3, 2, 5, 3]
    """
    factor = 2
    while n > factor:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


class _Piece(NamedTuple):
    """A root with some of its tree's children, which are in one row."""

    tree: int
    children: list[int]
    size: int


class _Layout(NamedTuple):
    length: int  # T
    rows: list[list[list[_Piece]]]  # the pieces of each row of each block
    row_count: int  # rows of a block, with empty ones

    @property
    def work(self) -> float:
        return _work(self.row_count, self.length)

    def fill(self, blocks: int) -> float:
        """Share of the places that hold a token."""
        tokens = sum(piece.size for block in self.rows for row in block for piece in row)
        return tokens / (blocks * self.row_count * self.length)


def _work(rows: int, length: int) -> float:
    # Scores are T per token; against the other products of usual models, they are 1 at 4,096.
    return rows * length * (1 + length / 4096)


def _row_lengths(longest: int, eighths: Sequence[int], multiple: int) -> list[int]:
    """Lengths with room for the longest child and its root.

    >>> _row_lengths(40, _FEW, 1), _row_lengths(40, _MORE, 1)
    ([64, 128, 256], [40, 48, 56, 96])
    """
    power = 8
    while power < longest:
        power *= 2
    lengths = (power * n // 8 for n in eighths)
    return sorted({round_up(n, multiple) for n in lengths if n >= max(longest, 8)})


def _layout(sizes, length: int, blocks: int, shared: bool) -> _Layout:
    each = len(sizes) // blocks
    rows = []
    for first in range(0, len(sizes), each):
        pieces = [
            piece
            for tree in range(first, first + each)
            for piece in _pieces(tree, sizes[tree], length, shared)
        ]
        packed = pack([piece.size for piece in pieces], length)
        rows.append([[pieces[segment.document] for segment in row] for row in packed])
    most = max((len(block) for block in rows), default=1)
    return _Layout(length, rows, _row_bucket(most))


def _row_bucket(count: int) -> int:
    """Rounds a number of rows up to 1 to 8, 10, 12, 14, 16, 20, 24, ...: few, and close together.

    >>> [_row_bucket(n) for n in (0, 1, 7, 9, 15, 17, 33)]
    [1, 1, 7, 10, 16, 20, 40]
    """
    step = 1
    while 8 * step < count:
        step *= 2
    return round_up(max(count, 1), step)


def _pieces(tree: int, size: tuple[int, list[int]], length: int, shared: bool) -> list[_Piece]:
    """The whole tree if it fits into a row, else parts of it, by best fit."""
    root, children = size
    if not shared:
        return [_Piece(tree, [i], root + n) for i, n in enumerate(children)]
    if not children:
        return []
    if root + sum(children) <= length:
        return [_Piece(tree, list(range(len(children))), root + sum(children))]
    empty = [i for i, n in enumerate(children) if not n]
    parts = [[segment.document for segment in row] for row in pack(children, length - root)]
    parts[0] = empty + parts[0]
    return [_Piece(tree, sorted(part), root + sum(children[i] for i in part)) for part in parts]


def _lay(trees: Sequence[Tree], layout: _Layout, blocks: int, shared: bool) -> Forest:
    T, per_block = layout.length, layout.row_count
    rows = {name: np.zeros((blocks * per_block, T), np.int32) for name in ROWS}
    rows["previous"][:] = -1
    firsts = np.cumsum([0, *(len(children) for _, children in trees)])
    starts, ends = np.zeros(firsts[-1], np.int32), np.full(firsts[-1], -1, np.int32)

    def write(row: int, start: int, ids, position: int, segment: int, parent: int) -> int:
        place = (row, slice(start, start + len(ids)))
        rows["input_ids"][place] = ids
        rows["positions"][place] = np.arange(position, position + len(ids))
        rows["segment_ids"][place] = segment
        rows["parent_ids"][place] = parent
        return start + len(ids)

    for row, (local, pieces) in enumerate(_numbered(layout, per_block)):
        stop = segment = 0
        for piece in pieces:
            root, children = trees[piece.tree]
            segment += 1
            stop = write(row, stop, root, 0, segment, 0)
            last, parent = stop - 1, segment if shared and len(root) else 0
            for child in piece.children:
                segment += shared
                ids, number = children[child], firsts[piece.tree] + child
                before, start = (last if len(root) else -1), stop
                stop = write(row, start, ids, len(root), segment, parent)
                if len(ids):
                    rows["previous"][row, start:stop] = [before, *range(start, stop - 1)]
                starts[number] = local * T + start
                if len(ids) or len(root):
                    ends[number] = local * T + (stop if len(ids) else last + 1) - 1
    return Forest(rows, starts, ends)


def _numbered(layout: _Layout, per_block: int):
    """The number of each row in its block, and its pieces; empty rows fill up a block."""
    for block in layout.rows:
        for local in range(per_block):
            yield local, block[local] if local < len(block) else []


def places(starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """`[..., C]` int32: the places of children's tokens, -1 behind their ends.

    Args:
      starts, lengths: `[...]`; a length of 0 has no place.
      width: C.

    >>> places(np.array([4, 9]), np.array([2, 0]), 3).tolist()
    [[4, 5, -1], [-1, -1, -1]]
    """
    offsets = np.arange(width)
    inside = offsets < lengths[..., None]
    return np.where(inside, starts[..., None] + offsets, -1).astype(np.int32)


def pack_rows(
    batch: Mapping[str, np.ndarray], blocks: int = 1, multiple: int = 1
) -> dict[str, np.ndarray]:
    """Moves the documents of padded rows into fewer rows, if that is much less work.

    Args:
      batch: arrays `[B, T]` on the host. Where `segment_ids` is missing, padding is not in front of
        a document of its row, or an array has another shape, the batch is returned as it is.
      blocks: micro-batches times devices that share a batch; divides B.
      multiple: the new T is a multiple of it (>= 1).

    Returns:
      The same arrays with other B and T, padded with 0, `labels` with -100.

    >>> rows = np.array([[5, 6, 0, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0]])
    >>> found = pack_rows({"input_ids": rows, "segment_ids": (rows > 0).astype(int)})
    >>> found["input_ids"].tolist(), found["segment_ids"].tolist()
    ([[5, 6, 7, 0, 0, 0, 0, 0]], [[1, 1, 2, 0, 0, 0, 0, 0]])
    """
    segments = batch.get("segment_ids")
    if not isinstance(segments, np.ndarray) or len(segments) % blocks:
        return dict(batch)
    (B, T), is_real = segments.shape, segments > 0
    lengths = is_real.sum(axis=1)
    # Empty rows fill up the last batch of an epoch: where the others are nearly full, it keeps the
    # shape for which the step is compiled.
    if lengths.sum() >= NEARLY_FULL * T * (lengths > 0).sum():
        return dict(batch)
    has_fronts = (is_real == (np.arange(T) < lengths[:, None])).all()
    if not has_fronts or any(np.shape(value) != (B, T) for value in batch.values()):
        return dict(batch)
    order = deal(lengths.tolist(), blocks)
    trees = [((), (batch["input_ids"][i, : lengths[i]],)) for i in order]
    # Rows that powers of two do not shorten stay as they are: their length is a multiple already.
    forest = pack_forest(trees, blocks=blocks, multiple=multiple, enough=0.0)
    shape = forest.rows["input_ids"].shape
    if _work(*shape) >= _work(B, T):
        return dict(batch)
    first = np.arange(B) // (B // blocks) * (shape[0] * shape[1] // blocks) + forest.starts
    out = {
        name: np.full(shape, IGNORE if name == "labels" else 0, value.dtype)
        for name, value in batch.items()
    }
    documents = np.zeros(shape[0], int)  # in each row so far
    for i, start in sorted(zip(order, first, strict=True), key=lambda pair: pair[1]):
        n, (row, column) = lengths[i], divmod(start, shape[1])
        for name, value in batch.items():
            out[name][row, column : column + n] = value[i, :n]
        out["segment_ids"][row, column : column + n] += documents[row]
        documents[row] += segments[i].max()
    return out
