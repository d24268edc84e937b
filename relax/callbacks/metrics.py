"""Metrics log: a JSON line every `logging_steps` updates and one per evaluation."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from relax.config.text import join_some, nan_to_null
from relax.files import fsync_path, json_object
from relax.trainers.callback import Callback, Event
from relax.trainers.sources import COUNT, PREFIX

# Fields that depend on the clock; all others are the same in every run of a configuration.
CLOCK_FIELDS = ("tokens_per_second", "elapsed_s", "step_time", "eps")
PHASE = "time/"  # prefix of metrics in seconds, which depend on the clock too


class MetricsLog(Callback):
    """Averages metrics over the logging window and writes them to a file.

    Floating-point metrics are means over the window's updates, except the learning rate, which is
    that of the last update; integer metrics are counts, summed over the whole run. `elapsed_s`
    counts from the start of `train`. A checkpoint stores the number of lines written so far, and a
    resumed run truncates the file to them.

    If a trainer logs the seconds of its phases as `time/...`, a line has their means per update,
    `time/update` (the compiled steps), `time/other`, and their sum `step_time`; if it counts
    episodes, `eps` is the number of episodes per second.

    Args:
      path: the file, which replaces one of an earlier run; None: no file.
      logging_steps: updates per line (>= 1).
      listeners: each is called with every record, a dict of numbers.

    Raises:
      OSError: from any hook, if the file cannot be written; it names the file.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        logging_steps: int = 10,
        listeners: tuple[Callable[[dict], None], ...] = (),
    ):
        self.path = None if path is None else Path(path)
        self.logging_steps = logging_steps
        self.listeners = listeners
        self.counts: dict[str, int] = {}
        self._window: list[dict] = []  # metrics of updates since the last line
        self._timed: list[bool] = []  # which of them enter the tokens per second
        self._lines = 0  # number of lines in the file that belong to this run
        self._offset: int | None = 0  # bytes of these lines; None until a resumed file is read
        self._shapes: set = set()
        self._phased = False  # whether the trainer logs the seconds of its phases
        self._start_clock()

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self.counts, self._window = {}, []
        self._timed = [False] * len(self._window)
        self._start_clock()
        self._restore()

    def on_batch_begin(self, event: Event) -> None:
        # Tokens per second exclude compilation, evaluation and checkpoints.
        shape = str(jax.tree.map(np.shape, event.batch))
        self._compiles = shape not in self._shapes
        if self._compiles:
            self._shapes.add(shape)
            self.sync()
        self._begun_s = time.monotonic()

    def on_batch_end(self, event: Event) -> None:
        metrics = event.metrics
        self._phased = self._phased or any(name.startswith(PHASE) for name in metrics)
        if self._phased:
            jax.block_until_ready(metrics)
            metrics = metrics | {f"{PHASE}update": time.monotonic() - self._begun_s}
        self._window.append(metrics)
        self._timed.append(not self._compiles)
        if self._compiles:
            jax.block_until_ready(event.metrics)
            self._clock_s = time.monotonic()
        if event.step % self.logging_steps == 0:
            self._log_window(event)

    def on_train_end(self, event: Event) -> None:
        if self._window:
            self._log_window(event)

    def on_validation_begin(self, event: Event) -> None:
        self.sync()

    def on_validation_end(self, event: Event) -> None:
        self._emit(event, {f"eval_{name}": value for name, value in event.metrics.items()})
        self.restart_clock()

    def on_save(self, event: Event) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last update, or the last call, from the time of updates."""
        self._clock_s = time.monotonic()

    def state_dict(self) -> dict:
        self.sync()
        if self._lines and self.path is not None and self.path.exists():
            fsync_path(self.path)  # a checkpoint must not refer to lines that are lost
        return {"counts": self.counts, "lines": self._lines, "window": self._window}

    def load_state_dict(self, state: dict) -> None:
        self.counts, self._window = dict(state["counts"]), list(state["window"])
        self._lines, self._offset = state["lines"], None

    def _start_clock(self) -> None:
        self._start_s = self._clock_s = self._window_s = time.monotonic()
        self._spent_s = 0.0

    def sync(self) -> None:
        """Fetches metrics from the device, and adds the time so far to that of updates."""
        fetched = jax.device_get(self._window)
        self._window = [
            {name: np.asarray(value).item() for name, value in metrics.items()}
            for metrics in fetched
        ]
        now_s = time.monotonic()
        self._spent_s += now_s - self._clock_s
        self._clock_s = now_s

    def _log_window(self, event: Event) -> None:
        self.sync()
        record: dict[str, float] = {}
        for name in dict.fromkeys(name for metrics in self._window for name in metrics):
            values = [metrics[name] for metrics in self._window if name in metrics]
            if isinstance(values[0], int):
                self.counts[name] = self.counts.get(name, 0) + sum(values)
                record[name] = self.counts[name]
            elif name == "learning_rate":
                record[name] = values[-1]
            elif name.startswith(PREFIX):
                record |= _source_mean(name, self._window)
            elif name.startswith(PHASE):
                record[name] = sum(values) / len(self._window)
            else:
                record[name] = sum(values) / len(values)
        timed = zip(self._window, self._timed, strict=True)
        tokens = sum(metrics.get("num_tokens", 0) for metrics, counts in timed if counts)
        if tokens:
            record["tokens_per_second"] = tokens / max(self._spent_s, 1e-9)
        self._add_other_time(record)
        self._window, self._timed, self._spent_s = [], [], 0.0
        self._emit(event, record)

    def _add_other_time(self, record: dict) -> None:
        phases = [value for name, value in record.items() if name.startswith(PHASE)]
        if phases:
            now_s = time.monotonic()
            step_s = (now_s - self._window_s) / len(self._window)
            self._window_s = now_s
            record |= {f"{PHASE}other": max(step_s - sum(phases), 0.0), "step_time": step_s}
            if episodes := sum(metrics.get("episode", 0) for metrics in self._window):
                record["eps"] = episodes / (step_s * len(self._window))

    def _emit(self, event: Event, metrics: dict) -> None:
        record: dict[str, float] = {"step": event.step}
        if event.epochs_done is not None:
            record["epoch"] = round(event.epochs_done, 6)
        record |= metrics | {"elapsed_s": time.monotonic() - self._start_s}
        plain = nan_to_null(record)
        self._write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._lines += 1
        for listener in self.listeners:
            listener(record)

    def _restore(self) -> None:
        """Truncates the file to the lines of this run."""
        if self.path is None:
            return
        if self._offset is None:  # resumed
            lines = self.path.read_bytes().splitlines(True) if self.path.is_file() else []
            kept = [line for line in lines[: self._lines] if line.endswith(b"\n")]
            if len(kept) < self._lines:
                warnings.warn(
                    f"'{self.path}' holds {len(kept)} of the {self._lines} lines that the run "
                    "wrote before its checkpoint; the others are lost, and new ones follow.",
                    stacklevel=2,
                )
            if damaged := [i for i, line in enumerate(kept, 1) if not _is_object(line)]:
                warnings.warn(
                    f"'{self.path}' is damaged in {join_some([f'line {i}' for i in damaged], 3)}, "
                    "which reports leave out.",
                    stacklevel=2,
                )
            self._lines, self._offset = len(kept), sum(map(len, kept))
        self._write(b"")

    def _write(self, line: bytes) -> None:
        """Appends to the lines of this run, and removes anything after them."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.seek(file.truncate(min(self._offset or 0, os.path.getsize(self.path))))
                file.write(line)
                file.flush()
                self._offset = file.tell()
        except OSError as error:  # errors of a full disk do not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _is_object(line: bytes) -> bool:
    try:
        json_object(line)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def exclude_from_timing(event: Event) -> Iterator[None]:
    """Context whose time is excluded from the time of updates."""
    callbacks = getattr(event.trainer, "callbacks", ())
    logs = [callback for callback in callbacks if isinstance(callback, MetricsLog)]
    for log in logs:
        log.sync()
    yield
    for log in logs:
        log.restart_clock()


def _source_mean(name: str, window: list[dict]) -> dict[str, float]:
    """A source's mean over the items of the window, or nothing if it had none."""
    counts = f"{name.rpartition('/')[0]}/{COUNT}"
    parts = [(metrics[name], metrics[counts]) for metrics in window if name in metrics]
    total = sum(count for _, count in parts)
    return {name: sum(value * count for value, count in parts) / total} if total else {}
