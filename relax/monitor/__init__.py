"""Watching a run from outside: the status file that it keeps, and a live view of it."""

from relax.monitor.status import TrainingStatusWriter, read_status

__all__ = ["TrainingStatusWriter", "read_status"]
