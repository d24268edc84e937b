"""Pairs in a few flat arrays, in memory or memory-mapped."""

import array
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from relax.data.cache import Writer

_BLOCK = 2**16  # pairs whose rows are looked at together


class Preference(NamedTuple):
    """A prompt and two completions, int32.

    In unpaired data the second completion is another row's, for KTO's KL term.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    is_desirable: bool = True  # the first completion; always true in a pair
    margin: float = 0.0


class PairColumns(NamedTuple):
    """The flat arrays of pairs.

    Attributes:
      input_ids: int32, the prompt and both completions of a pair, and then those of the next.
      offsets: int64, where each of these parts begins, and the end of the last one.
      is_desirable: bool, one for each pair.
      margin: float64, one for each pair.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    is_desirable: np.ndarray
    margin: np.ndarray


class Pairs(Sequence):
    """A sequence of `Preference` over flat arrays; the parts of `pairs[i]` are views.

    Args:
      items: one pass is made, so they may come from a generator.
      columns: the arrays of pairs, instead of them.
      digest: their checksum, if it is known.
    """

    def __init__(
        self,
        items: Iterable[Preference] = (),
        *,
        columns: PairColumns | None = None,
        digest: int | None = None,
    ):
        if columns is None:
            ids = bytearray()
            parts = _write(items, ids.extend)
            columns = PairColumns(np.frombuffer(bytes(ids), np.int32), *parts)
        self.columns, self._digest = columns, digest

    @classmethod
    def written(cls, items: Iterable[Preference], writer: Writer, prefix: str = "") -> "Pairs":
        """Pairs in files, whose names begin with `prefix`."""
        with writer.growing(prefix + "input_ids", np.int32) as file:
            parts = _write(items, file.write)
        for name, part in zip(PairColumns._fields[1:], parts, strict=True):
            writer.save(prefix + name, part)
        names = (prefix + name for name in PairColumns._fields)
        return cls(columns=PairColumns(*map(writer.mapped, names)))

    def __len__(self) -> int:
        return len(self.columns.margin)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        i = int(index) % len(self)
        ids, offsets, is_desirable, margin = self.columns
        a, b, c, d = offsets[3 * i : 3 * i + 4].tolist()
        return Preference(ids[a:b], ids[b:c], ids[c:d], bool(is_desirable[i]), float(margin[i]))

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected completion, `[N, 3]` int32."""
        found = np.empty((len(self), 3), np.int32)
        for first in range(0, len(self), _BLOCK):
            part = self.columns.offsets[3 * first : 3 * (first + _BLOCK) + 1]
            found[first : first + _BLOCK] = np.diff(part).reshape(-1, 3)
        return found

    @property
    def digest(self) -> int:
        """A checksum of every token, where completions begin, the labels and the margins."""
        if self._digest is None:
            crc = 0
            for *parts, is_desirable, margin in self:
                for part in parts:
                    crc = zlib.crc32(part.tobytes(), zlib.crc32(len(part).to_bytes(8, "big"), crc))
                crc = zlib.crc32(bytes([is_desirable]) + np.float64(margin).tobytes(), crc)
            self._digest = crc
        return self._digest


def _write(items: Iterable[Preference], write_ids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the tokens of pairs one behind the other; returns the other columns."""
    lengths: Any = array.array("q")
    desirable, margins = bytearray(), array.array("d")
    for *parts, is_desirable, margin in items:
        for part in parts:
            ids = np.asarray(part, np.int32)
            write_ids(ids.tobytes())
            lengths.append(len(ids))
        desirable.append(is_desirable)
        margins.append(margin)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.frombuffer(lengths, np.int64), out=offsets[1:])
    return offsets, np.frombuffer(bytes(desirable), bool), np.frombuffer(margins, np.float64)
