"""Resources of a run: its directory, mesh, status file, signal handlers and checkpointer."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import jax
from rich.console import Console

from relax.checkpoint.arrays import copies_are_apart
from relax.checkpoint.checkpointer import Checkpointer, full_disk
from relax.checkpoint.frozen import WithoutFrozen
from relax.config import TrainerConfig
from relax.engine import checks, devices, output
from relax.engine.model_source import ModelSource
from relax.engine.terminal import standard_console
from relax.engine.watch import RunMonitor, report_start
from relax.errors import CheckpointError, ConfigError, ErrorList, Problems, RelaxError
from relax.models.huggingface.quantized import BaseQuantizer
from relax.parallel import processes
from relax.trainers.interrupt import Interrupt, Interrupted

FROM_PYTHON = "rows from Python"

C = TypeVar("C", bound=TrainerConfig)
C_co = TypeVar("C_co", bound=TrainerConfig, covariant=True)


class RunContext(Generic[C_co]):
    """The context manager of a `Run`, which acquires and releases its resources.

    Attributes:
      config: the configuration with an explicit mesh and batch sizes over all devices.
      local_config: the same with batch sizes per device, as in config.json.
      console: the output; silent in all processes but the first.
      resume_from: "auto" or the path of a checkpoint; None: a fresh run.
      problems: problems so far; `Run.load_data` raises them.
    """

    def __init__(
        self,
        config: C_co,
        train_rows=None,
        eval_rows=None,
        *,
        status_writer=None,
        console: Console | None = None,
    ):
        self.config: C_co = config
        self.status_writer = status_writer
        self.rows: Any = train_rows, eval_rows  # None once it is known that there are none
        self.console = console or standard_console()
        self.start_s = time.monotonic()
        self.problems = ErrorList()
        self.metrics: dict[str, float] = {}
        self.resume_from: str | None = None  # "auto" or the path of a checkpoint
        self.has_begun = False  # the directory holds a run that can be resumed
        self.tokenizer: Any = None
        self.task_evaluation: Any = None  # the callback of eval_tasks
        self._quantizer: BaseQuantizer | None = None
        self.keeps_frozen = False  # frozen weights are reloaded, not stored in checkpoints
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.status_writer is not None and not self.is_dry:
                stack.enter_context(report_start(self.status_writer, self.config))
            self.config, self.rows = _with_rows(self.config, *self.rows)
            self.config.check()
            self.interrupt = stack.enter_context(Interrupt(grace_s=self.config.system.grace_s))
            self._open_devices(stack)
            self._open_directory(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Interrupted):
            self._show_how_to_resume()
        final = self._final_error(error)
        self._stack.__exit__(type(final) if final else None, final, traceback)
        if final is not None and final is not error:
            raise final from error

    def _final_error(self, error: BaseException | None) -> BaseException | None:
        """The error to show to the user: a clearer one, or `error` itself."""
        if isinstance(error, OSError):
            if full_disk(error) is not None:
                return CheckpointError(f"the disk is full: {error}. {self._how_to_recover()}")
            if str(error.filename).startswith(str(self.run_dir.path)):
                recover = self._how_to_recover("make the path writable")
                return CheckpointError(f"the run cannot write its files: {error}. {recover}")
        if self.is_dry and isinstance(error, RelaxError) and not isinstance(error, Problems):
            # Any problem that a dry run finds ends it like a usage error.
            return Problems([str(error)])
        return error

    def _open_devices(self, stack: contextlib.ExitStack) -> None:
        """Joins the other processes, makes the mesh, and applies this run's jax settings."""
        opened = devices.open_mesh(self.config, self.console, lambda: self.source.model_config)
        self.config, self.console = stack.enter_context(opened)
        self.config = devices.with_dtype(self.config, self.console)
        devices.check_host_memory(self.config, self.console)
        self.local_config = self.config  # for config.json: batch sizes per device
        self.config = devices.for_all_devices(self.config)
        if self.config.debug.debug_nans:
            stack.enter_context(jax.debug_nans(True))
        cache = devices.compilation_cache_dir(self.config.system.compilation_cache_dir)
        if cache is not None:
            stack.enter_context(_compilation_cache(str(cache)))

    def _open_directory(self, stack: contextlib.ExitStack) -> None:
        """Locks the output directory, finds the checkpoint to resume from, starts monitoring."""
        config, console = self.local_config, self.console
        self.run_dir = stack.enter_context(devices.run_dir(config.output.output_dir))
        if not self.is_dry:
            stack.enter_context(self.run_dir)
        stack.enter_context(warnings.catch_warnings())
        with self.problems.catch():
            self.monitor = RunMonitor(config, self.run_dir, console, self.status_writer)
        if not self.is_dry:
            self.problems.raise_all()
            stack.enter_context(self.monitor)
        warnings.showwarning = self._print_warning if self.is_dry else self.monitor.show_warning
        config.warn()
        asked = (config.output.resume, config.output.overwrite_output_dir, console.print)
        prepare = partial(self.run_dir.prepare, clear=False)
        look = self.run_dir.look if self.is_dry else prepare
        with self.problems.catch():
            self.resume_from = processes.broadcast_from_main(lambda: _text(look(*asked)))
        self.has_begun = self.resume_from is not None
        asynchronous = config.output.save_async
        self.checkpointer = Checkpointer(
            self.run_dir.checkpoints,
            save_total_limit=config.output.save_total_limit,
            asynchronous=copies_are_apart() if asynchronous is None else asynchronous,
            warn=warnings.warn,
        )
        self.saver: Checkpointer | WithoutFrozen = self.checkpointer
        if not self.is_dry:
            self.problems.raise_all()
            processes.broadcast_from_main(self.checkpointer.sweep)
        if self.resume_from is not None:
            with self.problems.catch():
                for line in checks.changed_fields(config, self._old_run):
                    console.print(f"changed since the run started: {line}", markup=False)

    @property
    def is_dry(self) -> bool:
        return self.config.debug.dry_run

    @property
    def is_demo(self) -> bool:
        """Whether the run uses the demo task, since no dataset is given."""
        return self.config.data.dataset_name is None

    @cached_property
    def source(self) -> ModelSource:
        """The files of the model."""
        return ModelSource.find(self.config.model.model_name_or_path)

    def attempt(self, f: Callable, *args, **kwargs) -> Any:
        """The result of `f`, or None if it raised a `RelaxError`, which `load_data` reports."""
        with self.problems.catch():
            return f(*args, **kwargs)

    def close_at_end(self, resource):
        """Closes `resource` when the run ends, even by an error; returns it."""
        if resource is not None:
            self._stack.callback(resource.close)
        return resource

    @property
    def _old_run(self) -> Path:
        """The directory of the resumed run."""
        if self.resume_from is None or self.resume_from == "auto":
            return self.run_dir.path
        return Path(self.resume_from).parent.parent

    def _print_warning(self, message, *_: Any, **__: Any) -> None:
        self.console.print(f"warning: {message}", style="yellow", markup=False)

    def _show_how_to_resume(self) -> None:
        if self.has_begun:
            steps = self.checkpointer.steps()
            output.show_how_to_resume(self.console, steps, self._resume_command())
        else:
            self.console.print(
                "stopped before the first update: rerun the same command to start over"
            )

    def _how_to_recover(self, first: str = "make room") -> str:
        return output.how_to_recover(self.checkpointer.steps(), self._resume_command(), first)

    def _resume_command(self) -> str:
        return output.resume_command(self.local_config, self.run_dir.path)


def _with_rows(config: C, train_rows, eval_rows) -> tuple[C, tuple[Any, Any] | None]:
    """The configuration of a run on Python rows, and its (train, eval) rows, or None for files."""
    if train_rows is None:
        if eval_rows is not None:
            raise ConfigError("eval_rows need train_rows: pass both, or use eval_dataset_name.")
        if config.data.dataset_name == FROM_PYTHON:
            raise ConfigError(
                f"dataset_name {FROM_PYTHON!r} names no data: pass the rows as train_rows, or "
                "another dataset_name."
            )
        return config, None
    for name in (config.data.dataset_name, config.data.eval_dataset_name):
        if name not in (None, FROM_PYTHON):
            raise ConfigError("pass either rows or dataset_name, not both.")
    # Tells the rules that there are rows; config.json must not claim to reproduce the run.
    held_out = None if eval_rows is None else FROM_PYTHON
    named = config.replace(dataset_name=FROM_PYTHON, eval_dataset_name=held_out)
    return named, (train_rows, eval_rows)


def _text(start: Path | str | None) -> str | None:
    """A checkpoint to start from, as a JSON value for the other processes."""
    return None if start is None else str(start)


@contextlib.contextmanager
def _compilation_cache(directory: str) -> Iterator[None]:
    """Context that caches compiled steps in a directory."""
    before = getattr(jax.config, devices.CACHE_DIR)
    jax.config.update(devices.CACHE_DIR, directory)
    try:
        yield
    finally:
        jax.config.update(devices.CACHE_DIR, before)
