"""From a configuration to a finished run: the door through which scripts and notebooks come."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from relax.checkpoint.checkpointer import full_disk
from relax.config import TrainerConfig
from relax.engine import devices, output
from relax.engine.dry_run import dry_run
from relax.engine.run import Job, JobResult
from relax.engine.terminal import StandardOutput
from relax.engine.watch import RunMonitor, final_status
from relax.errors import CheckpointError, ConfigError
from relax.monitor.status import ENDED, TrainingStatusWriter
from relax.trainers.interrupt import Interrupt, Interrupted

__all__ = ["JobResult", "TrainerEngine"]

FROM_PYTHON = "rows from Python"


class TrainerEngine:
    """Runs jobs, one after the other.

    Args:
      status_writer: told where each job is, and of those that are refused.
      console: where progress is shown; None: standard output.
    """

    def __init__(
        self, status_writer: TrainingStatusWriter | None = None, *, console: Console | None = None
    ):
        self.status_writer = status_writer
        self.console = console or Console(file=StandardOutput(), highlight=False, soft_wrap=True)

    def run_job(
        self,
        config: TrainerConfig,
        train_rows=None,
        eval_rows=None,
        *,
        raise_errors: bool = True,
    ) -> JobResult:
        """Carries out one configuration.

        Args:
          config: of the algorithm to run.
          train_rows, eval_rows: in place of named data: lists of dicts, `datasets` objects or
            other iterables of dicts; `eval_rows` may be several by name.
          raise_errors: False: what goes wrong is the result's `error`, so that a row of jobs goes
            on behind one that failed. Ctrl-C and SIGTERM end them all.

        Raises:
          RelaxError: something about the configuration, the data, the model or the disk.
          Interrupted: Ctrl-C or SIGTERM, after saving; the command that goes on was printed.
        """
        try:
            return self._run_job(config, train_rows, eval_rows)
        except Exception as error:
            if raise_errors:
                raise
            self.console.print(f"failed: {error}", style="red", markup=False)
            directory = Path(config.output.output_dir)
            begun = not config.debug.dry_run and directory.is_dir()
            best = output.best_checkpoint(config, directory) if begun else None
            return JobResult(
                None, {}, directory, best_checkpoint=best, error=_without_frames(error)
            )

    def _run_job(self, config: TrainerConfig, train_rows, eval_rows) -> JobResult:
        with contextlib.ExitStack() as stack:
            if self.status_writer is not None and not config.debug.dry_run:
                stack.enter_context(_told(self.status_writer, config))
            config.check()
            return self._carry_out(*_with_rows(config, train_rows, eval_rows))

    def _carry_out(self, config: TrainerConfig, rows) -> JobResult:
        with contextlib.ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt(grace_s=config.system.grace_s))
            config, console = stack.enter_context(devices.open_mesh(config, self.console))
            run_dir = stack.enter_context(devices.run_dir(config.output.output_dir))
            if not config.debug.dry_run:
                stack.enter_context(run_dir)
            if config.debug.debug_nans:
                stack.enter_context(jax.debug_nans(True))
            if config.system.compilation_cache_dir:
                stack.enter_context(_compilation_cache(config.system.compilation_cache_dir))
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = self._show_warning
            config.warn()
            if config.debug.dry_run:
                job = Job(config, run_dir, console, rows)
                stack.callback(job.close)
                return dry_run(job)
            watch = stack.enter_context(RunMonitor(config, run_dir, console, self.status_writer))
            warnings.showwarning = watch.show_warning
            job = Job(config, run_dir, console, rows, watch)
            stack.callback(job.close)
            try:
                return job.run(interrupt)
            except Interrupted:
                job.show_how_to_go_on()
                raise
            except OSError as error:
                if full_disk(error) is None:
                    if not str(error.filename).startswith(str(run_dir.path)):
                        raise
                    raise CheckpointError(
                        f"the run cannot write its files: {error}. "
                        f"{job.how_to_recover('make the path writable')}"
                    ) from error
                raise CheckpointError(
                    f"the disk is full: {error}. {job.how_to_recover()}"
                ) from error

    def _show_warning(self, message, *_):
        self.console.print(f"warning: {message}", style="yellow", markup=False)


def _with_rows(config: TrainerConfig, train_rows, eval_rows) -> tuple[TrainerConfig, Any]:
    """The configuration of a job on rows from Python, and both kinds of rows; None: on files."""
    if train_rows is None:
        if eval_rows is not None:
            raise ConfigError("eval_rows need train_rows: give both, or eval_dataset_name.")
        return config, None
    if config.data.dataset_name or config.data.eval_dataset_name:
        raise ConfigError("give rows or dataset_name, not both.")
    # So that config.json does not claim to repeat the run.
    return config.replace(dataset_name=FROM_PYTHON), (train_rows, eval_rows)


@contextlib.contextmanager
def _told(writer: TrainingStatusWriter, config: TrainerConfig) -> Iterator[None]:
    """A writer learns of a job that is refused before there is anything to watch, too."""
    writer.begin(algorithm=config.algorithm, output_dir=config.output.output_dir)
    try:
        yield
    except BaseException as error:
        if writer.fields["phase"] not in ENDED and jax.process_index() == 0:
            writer.update(force=True, **final_status(error))
        raise


def _without_frames(error: Exception) -> Exception:
    """The error without tracebacks, whose frames would hold on to the job's arrays."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


@contextlib.contextmanager
def _compilation_cache(directory: str) -> Iterator[None]:
    """Compiled steps are kept in a directory, for as long as this job runs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", directory)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
