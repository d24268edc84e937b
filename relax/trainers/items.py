"""Reading a loader from a given position of an epoch."""

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class OrderedLoader(Protocol):
    """A loader whose order depends only on (epoch, position), so that a run resumes at once."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


def items_of(loader, epoch: int, start: int) -> Iterator:
    """Items of an epoch from position `start` on; a plain iterable skips up to there."""
    if isinstance(loader, OrderedLoader):
        return loader.batches(epoch, start)
    items = iter(loader)
    skipped = sum(1 for _ in itertools.islice(items, start))
    if skipped < start:
        raise ValueError(
            f"the train loader ended after {skipped} items, but the run resumes from item {start} "
            "of the epoch. Pass the loader that the run started with, and `progress` if that "
            "loader has no length."
        )
    return items


def require_items(position: int, epoch: int) -> None:
    """Raises a ValueError if an epoch has ended before its first item."""
    if position == 0:
        raise ValueError(
            f"the train loader gave no batch in epoch {epoch}. Pass an iterable that can be "
            "iterated again for every epoch, such as a list; a generator is exhausted after one."
        )


def is_due(every: int | None, before: int, after: int) -> bool:
    """Whether there is a multiple of `every` in (before, after]."""
    return every is not None and every != 0 and after // every > before // every
