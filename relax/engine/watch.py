"""Monitoring of a run: status, report, previews, trackers, guards and callbacks."""

import contextlib
import copy
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import relax
from relax import parallel
from relax.callbacks.guards import NonFiniteGuard
from relax.callbacks.previews import Previews, questions_of
from relax.callbacks.profiler import Profiler
from relax.callbacks.report import Report
from relax.callbacks.status import Status
from relax.callbacks.stopping import BestCheckpoint, EarlyStopping, Mode
from relax.callbacks.trackers import Trackers, tracker_makers
from relax.callbacks.warnings import LearningMonitor
from relax.checkpoint.checkpointer import Checkpointer
from relax.checkpoint.frozen import WithoutFrozen
from relax.config import TrainerConfig
from relax.config.imports import make_object
from relax.config.watch_rules import best_metric, is_greater_better, keeps_best, profile_window
from relax.engine.run_dir import RunDir
from relax.errors import ConfigError, RelaxError
from relax.monitor.status import ENDED, TrainingStatusWriter, read_status, without_secrets
from relax.sampling import SamplingConfig
from relax.trainers.callback import Callback
from relax.trainers.interrupt import Interrupted

STATUS_FILE = "status.json"


def final_status(error: BaseException | None) -> dict[str, Any]:
    """The final status fields of a run that ended with `error`, or None for success."""
    if error is None:
        return {"phase": "finished", "time_left_s": 0.0}
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return {"phase": "stopped"}
    message = str(error) if isinstance(error, RelaxError) else f"{type(error).__name__}: {error}"
    return {"phase": "failed", "error": "\n".join([message, *getattr(error, "__notes__", ())])}


@contextlib.contextmanager
def report_start(writer: TrainingStatusWriter, config: TrainerConfig) -> Iterator[None]:
    """Reports a run to a status writer from its start, even if the run cannot start."""
    writer.begin(algorithm=config.algorithm, output_dir=config.output.output_dir)
    try:
        yield
    except BaseException as error:
        if writer.fields["phase"] not in ENDED and jax.process_index() == 0:
            writer.update(force=True, **final_status(error))
        raise


class RunMonitor:
    """Context manager for status, report, previews, trackers, guards and callbacks of a run.

    Callbacks run in this order: metrics and progress, the algorithm's, guard, monitor, trackers,
    previews, early stopping, profiler, those of `--callbacks`, the best checkpoint (which saves the
    state of all before it), report, status.

    Nothing is written to the run's directory before `begin`, so that a run that cannot start leaves
    no files there; a writer given by the caller gets the status from the start.

    Args:
      config: the run's configuration.
      run_dir: the run's directory.
      console: shows the warnings.
      writer: a status writer in addition to that of the run's directory.
    """

    def __init__(
        self,
        config: TrainerConfig,
        run_dir: RunDir,
        console: Console,
        writer: TrainingStatusWriter | None = None,
    ):
        self.config, self.run_dir, self.console = config, run_dir, console
        self.directory = run_dir.path
        self.begun = False
        self.values = config.flat()
        self.is_main = jax.process_index() == 0  # only one process reports
        writers = [] if writer is None or not self.is_main else [writer]
        self.status = Status(writers, run_dir.checkpoints)
        self.report = Report(self.directory, self.warn)
        self.best: BestCheckpoint | None = None
        self.own = [make_object(spec, "callbacks") for spec in config.system.callbacks]
        for spec, callback in zip(config.system.callbacks, self.own, strict=True):
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks {spec!r} must derive from relax.callbacks.Callback.")
        self.makers = tracker_makers(
            config.output.report_to,
            self.directory,
            config.output.run_name,
            json.loads(without_secrets(json.dumps(config.to_dict()))),
        )

    def __enter__(self) -> "RunMonitor":
        for writer in self.status.writers:
            writer.begin(**self._circumstances())
            writer.write()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.status.enter(**final_status(error))
        if self.begun:
            self.report.write()

    def begin(self, resumed: bool = False) -> None:
        """Starts to keep the status in the run's directory.

        Args:
          resumed: keep the warnings and times that the earlier part of the run wrote there.
        """
        self.begun = True
        writer = TrainingStatusWriter(self.directory / STATUS_FILE)
        old = read_status(writer.path) if resumed else None
        if resumed and old is None and writer.path.exists():
            self.warn(
                f"'{writer.path}' cannot be read: warnings and times of the run so far are lost."
            )
        writer.begin(**self._circumstances())
        if old:
            self.status.take_over(old)
            warned = old.get("warnings")
            writer.fields["warnings"] = warned if isinstance(warned, list) else []
        self.status.writers.append(writer)
        self.status.enter("compiling")

    def warn(self, text: str) -> None:
        """Shows a warning and adds it to the status."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)
        for writer in self.status.writers:
            writer.warn(text)

    def show_warning(self, message, *_: Any, **__: Any) -> None:
        """Replacement for `warnings.showwarning`."""
        self.warn(str(message))

    def callbacks(self, others: tuple, tokenizer, eval_loader, **ends) -> tuple:
        """The callbacks of the run, in order, after metrics and progress.

        Args:
          others: the algorithm's callbacks.
          tokenizer: the model's tokenizer.
          eval_loader: the evaluation loader, several by name, or None.
          **ends: `eos_token_ids` and `stop` of a `SamplingConfig`, which end a completion.
        """
        v = self.values
        made: list[Callback] = [*others]
        if v["max_nonfinite_steps"]:
            path = self.directory / "bad_batch.jsonl"
            made.append(NonFiniteGuard(v["max_nonfinite_steps"], path))
        made.append(LearningMonitor(self.warn))
        if self.makers and self.is_main:
            made.append(Trackers(self.makers, self.warn))
        if v["num_samples"]:
            made.append(self._previews(tokenizer, eval_loader, ends))
        metric = best_metric(v, self.config.algorithm)
        mode: Mode = "max" if is_greater_better(v, metric) else "min"
        if v["early_stopping_patience"] is not None:
            patience, delta = v["early_stopping_patience"], v["early_stopping_threshold"]
            made.append(EarlyStopping(metric, patience, delta, mode))
        if v["profile_steps"] is not None:
            window = profile_window(v["profile_steps"])
            made.append(Profiler(self.directory / "profile", *window, self.console))
        made += self.own
        if keeps_best(v):
            self.best = BestCheckpoint(self.run_dir.best, metric, mode)
            made.append(self.best)
        return (*made, self.report, self.status)

    def save_best_as(self, saver) -> None:
        """Saves the best state with `saver`, without weights that are frozen elsewhere."""
        if self.best is not None and isinstance(saver, WithoutFrozen):
            self.best.saver = copy.copy(saver)
            self.best.saver.checkpointer = Checkpointer(self.best.directory, save_total_limit=1)

    def best_state(self, state) -> tuple[Any, dict[str, float]]:
        """The state to export and its evaluation: the best if that is configured.

        Otherwise the given last state, and {}.
        """
        if not self.values["load_best_model_at_end"] or self.best is None:
            return state, {}
        store = Checkpointer(self.best.directory)
        if self.best.step is None or self.best.step not in store.steps():
            self.warn("no evaluation gave a best state: the last state is exported")
            return state, {}
        frozen, without = state.frozen, isinstance(self.best.saver, WithoutFrozen)
        template = jax.eval_shape(lambda s: s, state.replace(frozen={}) if without else state)
        found, _, step = store.restore(parallel.sharded_shapes(template))
        self.console.print(f"restoring the best state, of step {step}")
        evaluation = {f"eval_{name}": value for name, value in self.best.metrics.items()}
        return found.replace(frozen=frozen) if without else found, evaluation

    def _previews(self, tokenizer, eval_loader, ends: dict) -> Previews:
        loaders = list(eval_loader.values()) if isinstance(eval_loader, dict) else [eval_loader]
        count = self.values["num_samples"]
        shares = [(count + i) // len(loaders) for i in range(len(loaders))]
        questions = [
            question
            for loader, share in zip(loaders, reversed(shares), strict=True)
            for question in questions_of(loader, tokenizer, share)
        ]
        if not questions or self.config.algorithm == "reward":
            raise ConfigError(
                "num_samples has no effect: this run has no held-out prompts to complete. Remove "
                "it."
            )
        most = self.values.get("max_completion_length", self.values["max_new_tokens"])
        sampling = SamplingConfig(max_new_tokens=most, **ends)
        directory = self.directory / "samples"
        listener = self._report_preview
        return Previews(questions, directory, tokenizer, sampling, self.console, listener)

    def _report_preview(self, records: list[dict]) -> None:
        self.status.update(force=True, last_preview=records[0])

    def _circumstances(self) -> dict[str, Any]:
        device = jax.devices()[0]
        kinds = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
        return {
            "algorithm": self.config.algorithm,
            "output_dir": str(self.directory),
            "environment": {
                "command": shlex.join([Path(sys.executable).name, *sys.argv]),
                "relax": relax.__version__,
                "python": platform.python_version(),
                "jax": jax.__version__,
                "devices": kinds,
                "cores": os.cpu_count(),
                # Not platform(), which starts a process to ask for the processor.
                "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            },
        }
