"""The errors that ReLax raises: each states the problem, the value, and what to do.

A script prints the message of a `RelaxError` without a traceback and exits with its `exit_code`:
1 for a run that failed, 2 for a usage, configuration, data or model problem found before the run.
"""

import contextlib
from collections.abc import Iterator

# The message of every loader that gets such a file.
CONVERT_FIRST = "'{path}' is a GGUF file: convert it with `relax gguf {path} DIR`, then load DIR."


class RelaxError(Exception):
    """Base class of all errors of ReLax."""

    exit_code = 1


class ConfigError(RelaxError, ValueError):
    """A flag or a field is unknown, mistyped, contradictory or without effect."""

    exit_code = 2


class Problems(ConfigError):
    """Several problems, one sentence each.

    Args:
      problems: sentences.
    """

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(RelaxError, ValueError):
    """A data set or one of its rows cannot be used."""

    exit_code = 2


class ModelLoadError(RelaxError, ValueError):
    """A model directory is invalid or does not match its configuration."""

    exit_code = 2


class CheckpointError(RelaxError, ValueError):
    """A checkpoint cannot be written, or is damaged."""


class ResumeError(CheckpointError):
    """A checkpoint cannot be resumed from: it is missing, damaged, or of another run or version."""

    exit_code = 2


class RewardError(RelaxError, RuntimeError):
    """Reward functions fail too often, or cannot run."""


class NonFiniteError(RelaxError, FloatingPointError):
    """Loss or gradient were not finite in several consecutive steps."""


class ErrorList:
    """Collects the errors raised within `with errors.catch():`, to report them together.

    >>> found = ErrorList()
    >>> with found.catch():
    ...     raise RelaxError("one")
    >>> found.errors
    [RelaxError('one')]
    """

    def __init__(self):
        self.errors: list[RelaxError] = []

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        try:
            yield
        except RelaxError as error:
            self.note(error)

    def note(self, error: RelaxError) -> None:
        """Adds an error, unless all its sentences are known."""
        noted = {problem for known in self.errors for problem in _sentences(known)}
        if not set(_sentences(error)) <= noted:
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raises the collected errors as one; returns if there are none.

        Raises:
          RelaxError: an error was collected.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            sentences = [problem for error in self.errors for problem in _sentences(error)]
            raise Problems(list(dict.fromkeys(sentences)))


def _sentences(error: RelaxError) -> list[str]:
    return error.problems if isinstance(error, Problems) else [str(error)]
