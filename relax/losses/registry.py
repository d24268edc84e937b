"""Choices by name: one way to register a loss, an advantage or a KL estimator of one's own."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from relax.config.imports import load_object
from relax.config.names import suggestion
from relax.config.watch_rules import is_reference

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """A dict of choices; an unknown name is refused with the nearest one and the known ones.

    A name of the form `path/to/file.py:name` or `package.module.name` is a function of the user's
    own: the choice that it was registered as or, if it was not, the one that it makes by itself.

    A name may be registered again, as happens when a notebook's cell is run twice: the last counts.

    Args:
      kind: the option whose values the names are, for messages.
      make: turns a function, and keyword arguments of `register`, into a choice; None: the function
        is the choice.

    Example:
      >>> SCALES = Registry("scale")
      >>> @SCALES.register("double")
      ... def double(x):
      ...     return 2 * x
      >>> SCALES["double"](3)
      6
      >>> SCALES["duoble"]
      Traceback (most recent call last):
        ...
      ValueError: unknown scale 'duoble'. Did you mean double? Known: double.
      >>> SCALES["math.sqrt"](9)
      3.0
    """

    def __init__(self, kind: str, make: Callable[..., T] | None = None):
        super().__init__()
        self.kind, self.make = kind, make

    def __missing__(self, name: str) -> T:
        if isinstance(name, str) and is_reference(name):
            function = load_object(name, self.kind)
            registered = (choice for choice in self.values() if _function_of(choice) is function)
            self[name] = next(registered, None) or self._choice(function)
            return self[name]
        hint = suggestion(str(name), self)
        raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(self)}.")

    def register(self, name: str, **properties: Any) -> Callable[[Callable], Callable]:
        """Returns a decorator that registers a function under `name` and returns it.

        Args:
          name: the choice's name.
          **properties: passed to `make`, with the function.
        """

        def add(function: Callable) -> Callable:
            self[name] = self._choice(function, **properties)
            return function

        return add

    def _choice(self, function: Callable, **properties: Any) -> T:
        make: Callable[..., Any] = self.make or (lambda function: function)
        return make(function, **properties)


def _function_of(choice: Any) -> Any:
    """The function that a choice was made from: itself, or the first field of a tuple."""
    return choice[0] if isinstance(choice, tuple) else choice
