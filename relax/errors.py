"""The errors that ReLax raises on purpose: each says what is wrong, the value, and what to do.

A script prints the message of a `RelaxError` without a traceback and exits with its `exit_code`:
1 for a run that failed, 2 for a usage, configuration, data or model problem found before the run.
"""


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
