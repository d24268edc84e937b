"""What a loader gives, from a position in an epoch on."""

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class OrderedLoader(Protocol):
    """A loader whose order is a function of (epoch, position), so that a run resumes at once."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


def items_of(loader, epoch: int, start: int) -> Iterator:
    """What a loader gives in an epoch from a position; a plain iterable is read up to there."""
    if isinstance(loader, OrderedLoader):
        return loader.batches(epoch, start)
    items = iter(loader)
    skipped = sum(1 for _ in itertools.islice(items, start))
    if skipped < start:
        raise ValueError(
            f"the train loader ended after {skipped} items, and the run is to go on from item "
            f"{start} of the epoch. Pass the loader that it began with, and `progress` where that "
            "has no length."
        )
    return items


def is_due(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and every != 0 and after // every > before // every
