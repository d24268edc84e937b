"""The errors that ReLax raises on purpose: each says what is wrong, the value, and what to do.

A script prints the message of a `RelaxError` without a traceback and exits with its `exit_code`:
1 for a run that failed, 2 for a usage, configuration, data or model problem found before the run.
"""

import contextlib
from collections.abc import Iterator

# Of every loader that is given such a file.
CONVERT_FIRST = "'{path}' is a GGUF file: convert it with `relax gguf {path} DIR`, then load DIR."


class RelaxError(Exception):
    """Base of all errors that ReLax raises on purpose."""

    exit_code = 1


class ConfigError(RelaxError, ValueError):
    """A flag or a field is unknown, mistyped, contradictory or without effect."""

    exit_code = 2


class Problems(ConfigError):
    """Several things are wrong, each in a sentence of its own.

    Args:
      problems: the sentences.
    """

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(RelaxError, ValueError):
    """A data set cannot be read, or a row of it cannot be trained on."""

    exit_code = 2


class ModelLoadError(RelaxError, ValueError):
    """A model directory is not what its configuration says."""

    exit_code = 2


class CheckpointError(RelaxError, ValueError):
    """A checkpoint could not be written, or is not what was written."""


class RewardError(RelaxError, RuntimeError):
    """Reward functions fail more often than is allowed, or cannot be run at all."""


class NonFiniteError(RelaxError, FloatingPointError):
    """Loss or gradient of several updates in a row were not finite."""


class ErrorList:
    """Notes the errors of what is done in `with collector.catch():` and goes on behind it.

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
