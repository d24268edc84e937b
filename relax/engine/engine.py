"""Entry point for notebooks and scripts: runs one configuration after another."""

import os
from pathlib import Path

from rich.console import Console

from relax.config import TrainerConfig
from relax.engine import output
from relax.engine.recipes import RECIPES
from relax.engine.run import RunResult
from relax.engine.terminal import standard_console
from relax.monitor.status import TrainingStatusWriter
from relax.parallel.cpu import prepare_cpu


class TrainerEngine:
    """Runs one configuration after another.

    Args:
      status_writer: receives the status of each run, even of one that cannot start.
      console: shows the progress; None: standard output.
    """

    def __init__(
        self, status_writer: TrainingStatusWriter | None = None, *, console: Console | None = None
    ):
        self.status_writer = status_writer
        self.console = console or standard_console()

    def run_job(
        self,
        config: TrainerConfig,
        train_rows=None,
        eval_rows=None,
        *,
        raise_errors: bool = True,
    ) -> RunResult:
        """Runs one configuration with its algorithm's recipe, see `relax.engine.recipes`.

        Args:
          config: the configuration of an algorithm.
          train_rows, eval_rows: as for `Run`.
          raise_errors: False: return an error in the result's `error`, so that the next
            configuration can run. Ctrl-C and SIGTERM always raise.

        Raises:
          RelaxError: a problem with the configuration, the data, the model or the disk.
          Interrupted: Ctrl-C or SIGTERM, after saving and printing the resume command.
        """
        where = {"status_writer": self.status_writer, "console": self.console}
        try:
            return RECIPES[config.algorithm](config, train_rows, eval_rows, **where)
        except Exception as error:
            if raise_errors:
                raise
            self.console.print(f"failed: {error}", style="red", markup=False)
            directory = Path(config.output.output_dir)
            has_begun = not config.debug.dry_run and directory.is_dir()
            best = output.best_checkpoint(config, directory) if has_begun else None
            return RunResult(
                None, {}, directory, best_checkpoint=best, error=_without_frames(error)
            )


def prepare_process() -> None:
    """Applies settings of the whole process; scripts call it before any computation.

    It configures XLA on CPUs for speed and predictable memory, and silences transformers' advice
    to install PyTorch, which is not needed here.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    prepare_cpu()


def _without_frames(error: Exception) -> Exception:
    """Removes tracebacks, whose frames would keep the run's arrays alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
