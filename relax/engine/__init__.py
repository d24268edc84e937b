"""From a configuration to a finished run."""

from relax.engine.engine import JobResult, TrainerEngine

__all__ = ["JobResult", "TrainerEngine"]
