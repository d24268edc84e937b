"""Choices by name: one way to register a loss, an advantage or a KL estimator of one's own."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dict of choices; an unknown name is refused with the known ones.

    A name may be registered again, as happens when a notebook's cell is run twice: the last counts.

    Args:
      kind: the option whose values the names are, for messages.

    Example:
      >>> SCALES = Registry("scale")
      >>> @SCALES.register("double")
      ... def double(x):
      ...     return 2 * x
      >>> SCALES["double"](3)
      6
      >>> SCALES["triple"]
      Traceback (most recent call last):
        ...
      ValueError: unknown scale 'triple'. Known: double.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __missing__(self, name):
        raise ValueError(f"unknown {self.kind} {name!r}. Known: {', '.join(self)}.")

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers under `name` and returns what it was given."""

        def add(choice: T) -> T:
            self[name] = choice
            return choice

        return add
