"""The engine: turns a configuration into a finished run."""

from relax.engine.engine import TrainerEngine, prepare_process
from relax.engine.run import Run, RunResult

__all__ = ["Run", "RunResult", "TrainerEngine", "prepare_process"]
