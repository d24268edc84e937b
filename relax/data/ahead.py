"""Work ahead of its reader, in a thread: what a tokenizer's Rust part does needs no Python lock."""

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_AHEAD = 2  # lists that wait for their reader


def in_lists(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter.

    >>> list(in_lists("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    remaining = iter(items)
    while some := list(itertools.islice(remaining, size)):
        yield some


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, in the same order, made in a thread while the caller uses earlier ones.

    An exception of theirs is raised behind the items before it. The thread ends with the iterator.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(_AHEAD)
    is_over = threading.Event()
    end = object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not is_over.is_set():
            try:
                return made.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if is_over.is_set():
                    return
            put(end)
        except BaseException as error:
            put(end, error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        is_over.set()
        thread.join()
