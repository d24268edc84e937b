"""Errors that are collected, so that all of them are told at once."""

import contextlib
from collections.abc import Iterator

from relax.errors import Problems, RelaxError


class Collector:
    """Notes the errors of what is done in `with collector.noting():` and goes on behind it.

    >>> found = Collector()
    >>> with found.noting():
    ...     raise RelaxError("one")
    >>> found.errors
    [RelaxError('one')]
    """

    def __init__(self):
        self.errors: list[RelaxError] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except RelaxError as error:
            self.note(error)

    def note(self, error: RelaxError) -> None:
        """Each sentence is noted once."""
        told = {problem for known in self.errors for problem in _sentences(known)}
        if not set(_sentences(error)) <= told:
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raises the one error, or one that has all of them, or none.

        Raises:
          RelaxError: something was noted.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            sentences = [problem for error in self.errors for problem in _sentences(error)]
            raise Problems(list(dict.fromkeys(sentences)))


def _sentences(error: RelaxError) -> list[str]:
    return error.problems if isinstance(error, Problems) else [str(error)]
