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
