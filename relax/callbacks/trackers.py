"""Experiment tracking: TensorBoard, Weights & Biases, trackio, or custom trackers."""

import concurrent.futures
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from relax.config.imports import make_object
from relax.errors import ConfigError
from relax.trainers.callback import Callback, Event

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_FAILURES = 10  # failures in a row after which a tracker is disabled


class Tracker(Protocol):
    """Receives metrics. `close`, if it has one, is called at the end."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


class Trackers(Callback):
    """Sends every record of `MetricsLog` to trackers; none of them can end the run.

    A tracker is started and closed in a separate thread, which is abandoned if it hangs. `log` is
    called directly, since the packages only queue the record. An error is reported once, and
    records that a tracker failed to log are counted. The method `show` is a listener of
    `MetricsLog`.

    Args:
      makers: functions by name that start a tracker, given the step to continue after.
      say: called with each problem, as a sentence.
      patience_s: seconds to wait for a tracker to start, and to close.
    """

    def __init__(
        self,
        makers: dict[str, Callable[[int], Tracker]],
        say: Callable[[str], None],
        patience_s: float = 60.0,
    ):
        self.makers, self.say, self.patience_s = makers, say, patience_s
        self._trackers: dict[str, Tracker] = {}
        self._failures: dict[str, int] = {}  # consecutive failures
        self._lost: dict[str, int] = {}  # records not logged

    def on_train_begin(self, event: Event) -> None:
        self.close()
        for name, maker in self.makers.items():
            try:
                self._trackers[name] = _call_within(self.patience_s, maker, event.step)
            except (Exception, SystemExit) as error:
                self.say(f"{name}: {_words(error, self.patience_s)}. The run continues without it.")

    def show(self, record: dict) -> None:
        """Sends one record of `MetricsLog`."""
        metrics = tagged(record)
        for name, tracker in list(self._trackers.items()):
            if self._failures.get(name, 0) >= _FAILURES:
                self._lost[name] += 1
                continue
            try:
                tracker.log(metrics, record["step"])
                self._failures[name] = 0
            except (Exception, SystemExit) as error:
                if name not in self._lost:
                    self.say(f"{name}: {_words(error)}. The run continues without it.")
                self._failures[name] = self._failures.get(name, 0) + 1
                self._lost[name] = self._lost.get(name, 0) + 1

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                _call_within(self.patience_s, getattr(tracker, "close", lambda: None))
            except (Exception, SystemExit) as error:
                self.say(f"{name} could not be closed: {_words(error, self.patience_s)}.")
        for name, count in self._lost.items():
            self.say(f"{name} failed to log {count} records; metrics.jsonl has all of them.")
        self._trackers, self._failures, self._lost = {}, {}, {}


def _call_within(seconds: float, function: Callable, *args):
    """Calls a function that may hang, and raises TimeoutError after `seconds`."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # also catches sys.exit in a tracker
            future.set_exception(error)

    # A daemon thread, so that the process can end while the function hangs.
    threading.Thread(target=call, daemon=True).start()
    return future.result(seconds)


def tagged(record: dict) -> dict[str, float]:
    """Renames the metrics of a record as transformers does, which trackers group by.

    >>> tagged({"step": 3, "loss": 1.0, "eval_loss": 2.0})
    {'train/loss': 1.0, 'eval/loss': 2.0}
    """
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step"
    }


def tracker_makers(
    names: list[str], directory: Path, run_name: str | None, config: dict[str, Any]
) -> dict[str, Callable[[int], Tracker]]:
    """Makes the functions that start the trackers named by `report_to`.

    Args:
      names: names of packages, or `path/to/file.py:Class`.
      directory: the run's directory.
      run_name: the name shown in trackers; None: the directory's name.
      config: the run's configuration, shown with it.

    Raises:
      ConfigError: a package is not installed, or a class cannot be made.
    """
    run_name = run_name or directory.resolve().name
    makers: dict[str, Callable[[int], Tracker]] = {}
    for name in names:
        if name == "none":
            continue
        if name not in PACKAGES:
            own = make_object(name, "report_to")
            if not callable(getattr(own, "log", None)):
                raise ConfigError(f"report_to {name!r} must have a method log(metrics, step).")
            makers[name] = functools.partial(_given, own)
            continue
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"report_to {name} needs the package {PACKAGES[name]}, which is not installed: "
                f'pip install "relax-trainers[{name}]".'
            )
        if name == "tensorboard":
            makers[name] = functools.partial(TensorBoard, directory / "events")
        else:
            makers[name] = functools.partial(_start_run, name, run_name, config, directory)
    return makers


def _given(tracker: Tracker, step: int) -> Tracker:
    return tracker


def _start_run(name: str, run_name: str, config: dict, directory: Path, step: int) -> Tracker:
    return RunTracker(name, run_name, config, directory / "events")


class TensorBoard:
    """Writes TensorBoard's event files.

    Args:
      directory: directory of the files, unless TENSORBOARD_LOGGING_DIR names another.
      step: hide records of an earlier run after this step.
    """

    def __init__(self, directory: Path, step: int = 0):
        from tensorboardX import SummaryWriter

        place = os.environ.get("TENSORBOARD_LOGGING_DIR", str(directory))
        self.writer = SummaryWriter(place, purge_step=step + 1 if step else None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class RunTracker:
    """A run of Weights & Biases, or of trackio, which has the same interface.

    The project is WANDB_PROJECT or TRACKIO_PROJECT, else `relax`. Weights & Biases keeps its own
    files in `directory`.
    """

    def __init__(self, package: str, run_name: str, config: dict[str, Any], directory: Path):
        self.package = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", "relax")
        options = {}
        if package == "wandb":
            directory.mkdir(parents=True, exist_ok=True)
            options = {"dir": str(directory), "reinit": "finish_previous"}
        self.run = self.package.init(project=project, name=run_name, config=config, **options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


def _words(error: BaseException, seconds: float = 0.0) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {seconds:.3g} s"
    name, lines = type(error).__name__, str(error).splitlines()
    return f"{name}: {lines[0][:200].rstrip('.')}" if lines else name
