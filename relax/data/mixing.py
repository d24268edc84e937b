"""Mixtures: several sources as one data set, in given shares, in an order of (seed, epoch)."""

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relax.data.order import epoch_order, permutation
from relax.errors import ConfigError

STRATEGIES = ("concat", "first_exhausted", "all_exhausted")
_WEIGHT = re.compile(r"(.+):((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)")
MOST_ROWS = 2**31 - 1  # of an epoch
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


class Source(NamedTuple):
    """A source of a mixture: its name in metrics, its path, and its weight, if it has one."""

    name: str
    path: str
    weight: Fraction | None


def parse_sources(text: str) -> list[Source] | None:
    r"""The sources that `dataset_name` lists; None if it names a single one without a weight.

    A list is `FILE,FILE` or `FILE:WEIGHT,FILE:WEIGHT`, and `NAME=FILE` gives a source another name
    than the file's. A text that is the path of a file or directory is that path. A comma within a
    path of a list is written `\,`; a colon needs nothing, since only a number at the end is a
    weight.

    Raises:
      ConfigError: a part is empty, some sources only have weights, a weight is 0 or no number, or
        two sources have one name.

    >>> [(s.name, s.path, float(s.weight)) for s in parse_sources("a.jsonl:0.7,b=c/train.csv:0.3")]
    [('a', 'a.jsonl', 0.7), ('b', 'c/train.csv', 0.3)]
    >>> parse_sources("user/set") is None
    True
    """
    if Path(text).exists():
        return None
    parts = [part.replace("\\,", ",").strip() for part in re.split(r"(?<!\\),", text)]
    if not all(parts):
        raise ConfigError(
            f"dataset_name must be a source, or several as FILE,FILE, and a part of {text!r} is "
            r"empty. Write a comma within a path as '\,'."
        )
    sources = [_source(part) for part in parts]
    if len(sources) == 1 and sources[0].path == text:
        return None
    if len({source.weight is None for source in sources}) > 1:
        without = next(source for source in sources if source.weight is None)
        raise ConfigError(
            f"either all sources of dataset_name have a weight or none, and {without.path!r} has "
            f"none in {text!r}. Write {without.path}:WEIGHT."
        )
    for source in sources:
        if source.weight == 0:
            raise ConfigError(
                f"the weight of a source must be above 0, got 0 for {source.path!r}. Leave it out."
            )
    names = [source.name for source in sources]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise ConfigError(
            f"two sources of dataset_name are named {again!r}. Name them as NAME=FILE,NAME=FILE."
        )
    return sources


def _source(part: str) -> Source:
    weight = None
    if not Path(part).exists() and (match := _WEIGHT.fullmatch(part)):
        part, weight = match[1], Fraction(match[2])
    file, colon, other = part.rpartition(":")
    if colon and not Path(part).exists() and Path(file.rpartition("=")[2]).exists():
        raise ConfigError(
            f"the weight of a source must be a number above 0, got {other!r} for {file!r}."
        )
    name, equals, path = part.partition("=")
    if equals and _NAME.fullmatch(name) and path and not Path(part).exists():
        return Source(name, path, weight)
    stem = re.sub(r"[^\w-]+", "_", Path(part).name.partition(".")[0]).strip("_")
    return Source(stem or part, part, weight)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How the rows of several sources, one source after the other, make up an epoch.

    With `concat` an epoch has every row once. Otherwise source i gives

        c_i = n_i                                          of the source that sets the length
        c_i = round(n_k w_i / w_k)                         of the others

    rows to an epoch, where n are numbers of rows and w weights, and k is the source that is
    exhausted first (`first_exhausted`) or last (`all_exhausted`). A source goes through all of its
    rows before one of them comes again, across epochs too.

    Args:
      names: the names of the sources, for metrics and messages.
      sizes: rows per source.
      weights: shares of the rows of an epoch, up to a factor; None: equal shares.
      strategy: one of `STRATEGIES`.

    Raises:
      ConfigError: an unknown strategy, weights with `concat`, or a source without a row or whose
        share of an epoch is no row.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[Fraction, ...] | None = None
    strategy: str = "concat"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"mixing_strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}."
            )
        if self.strategy == "concat" and self.weights is not None:
            raise ConfigError(
                "mixing_strategy concat takes every row once, whatever the weights: leave out the "
                "weights, or use first_exhausted or all_exhausted."
            )
        if sum(self.counts) > MOST_ROWS:
            raise ConfigError(
                f"an epoch of {self.strategy} would have {float(sum(self.counts)):.3g} rows, and "
                f"may have {MOST_ROWS:,}: lower the largest weight of {', '.join(self.names)}."
            )
        for name, size, count in zip(self.names, self.sizes, self.counts, strict=True):
            if not size:
                raise ConfigError(
                    f"source {name!r} has no row: leave it out, or hold out fewer rows for "
                    "evaluation."
                )
            if not count:
                raise ConfigError(
                    f"source {name!r} gives no row of its {size:,} to an epoch of "
                    f"{sum(self.counts):,} rows. Raise its weight, or leave it out."
                )

    @property
    def is_concat(self) -> bool:
        return self.strategy == "concat"

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each source in an epoch."""
        if self.strategy == "concat" or not all(self.sizes):
            return self.sizes
        weights = self.weights or (Fraction(1),) * len(self.sizes)
        choose = min if self.strategy == "first_exhausted" else max
        length = choose(size / weight for size, weight in zip(self.sizes, weights, strict=True))
        return tuple(math.floor(length * weight + Fraction(1, 2)) for weight in weights)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """The rows of an epoch, a function of (seed, epoch) alone.

        Args:
          shuffle: a new order of the rows of each source in every pass over them, and of the
            sources; False keeps the order of each source and spreads them evenly.
        """
        starts = np.cumsum([0, *self.sizes])
        if self.strategy == "concat":
            order = np.arange(starts[-1])
            return epoch_order(len(order), seed, epoch) if shuffle else order
        chosen, places = [], []
        for i, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            first, rows = epoch * count, []
            for turn in range(first // size, -(-(first + count) // size)):
                order = permutation(size, seed, turn, i + 1) if shuffle else np.arange(size)
                begin = max(first - turn * size, 0)
                rows.append(order[begin : first + count - turn * size])
            chosen.append(starts[i] + np.concatenate(rows))
            places.append((np.arange(count) + 0.5) / count)
        mixed = np.concatenate(chosen)
        if shuffle:
            return mixed[epoch_order(len(mixed), seed, epoch)]
        return mixed[np.argsort(np.concatenate(places), kind="stable")]

    def source_of(self, rows) -> np.ndarray:
        """The index of the source of each row."""
        return np.searchsorted(np.cumsum(self.sizes), rows, side="right").astype(np.int32)

    def resized(self, sizes: Sequence[int]) -> "Mixture":
        """The same mixture with other numbers of rows, such as those of packed ones."""
        return dataclasses.replace(self, sizes=tuple(sizes))

    def kept(self, rows) -> "Mixture":
        """The mixture of some rows, which may be repeated."""
        counts = np.bincount(self.source_of(rows), minlength=len(self.sizes))
        return self.resized(counts.tolist())

    def once(self) -> "Mixture":
        """The same sources with every row once, for evaluation."""
        return dataclasses.replace(self, weights=None, strategy="concat")

    def lines(self, epochs: float) -> list[str]:
        """What each source gives to an epoch and to a run of so many, for the data report."""
        found = [f"mixing ({self.strategy}): an epoch has {len(self):,} rows"]
        for name, size, count in zip(self.names, self.sizes, self.counts, strict=True):
            found.append(
                f"  {name}: {count:,} rows ({count / len(self):.1%}) of {size:,}, "
                f"{count / size:.2f} passes an epoch, {epochs * count / size:.2f} in the run"
            )
        return found
