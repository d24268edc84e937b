"""metrics.jsonl: a line every `logging_steps` updates, one per evaluation, each exactly once."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from relax.files import atomic_write
from relax.trainers.callback import Callback, Event

# Fields that depend on the clock: everything else is the same in every run of a configuration.
CLOCK_FIELDS = ("tokens_per_second", "elapsed_s", "step_time", "eps")
PHASE = "time/"  # metrics of this name are seconds, and clock fields as well


class MetricsLog(Callback):
    """Averages metrics over the logging window and writes them to a file.

    Floating-point metrics are means over the window's updates, but for the learning rate, which is
    the last update's; integer ones are counts, summed over the whole run. `elapsed_s` counts from
    the beginning of `train`. A checkpoint holds all records up to it: a resumed run cuts the file
    back to them, or writes them into a new one.

    Where a trainer gives seconds of its phases, as `time/...`, a line has their means per update,
    `time/update` (the compiled steps), `time/other`, and `step_time`, which is their sum; and where
    one counts episodes, `eps`, those of a second.

    Args:
      path: the file, written over if it is there; None: nothing is written.
      logging_steps: updates per line (>= 1).
      listeners: each is called with every record, a dict of numbers.

    Attributes:
      history: the records so far, as the file has them.
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
        self.history: list[dict] = []
        self._window: list[dict] = []  # metrics of updates since the last line
        self._timed: list[bool] = []  # which of them the tokens per second are made of
        self._offset = 0  # bytes of the file that belong to this run
        self._shapes: set = set()
        self._phased = False  # the trainer tells the seconds of its phases
        self._start_clock()

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self.counts, self._window = {}, []
        self._timed = [False] * len(self._window)
        self._start_clock()
        self._restore()

    def on_batch_begin(self, event: Event) -> None:
        # Compiling, like evaluating and saving, is kept out of the tokens per second.
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
        """The time since the last update, or the last call, is not spent on updates."""
        self._clock_s = time.monotonic()

    def state_dict(self) -> dict:
        self.sync()
        return {"counts": self.counts, "history": list(self.history), "window": self._window}

    def load_state_dict(self, state: dict) -> None:
        self.counts, self.history = dict(state["counts"]), list(state["history"])
        self._window = list(state["window"])

    def _start_clock(self) -> None:
        self._start_s = self._clock_s = self._window_s = time.monotonic()
        self._spent_s = 0.0

    def sync(self) -> None:
        """Fetches what is still on the device; the time up to here was spent on updates."""
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
        record = {}
        for name in dict.fromkeys(name for metrics in self._window for name in metrics):
            values = [metrics[name] for metrics in self._window if name in metrics]
            if isinstance(values[0], int):
                self.counts[name] = self.counts.get(name, 0) + sum(values)
                record[name] = self.counts[name]
            elif name == "learning_rate":
                record[name] = values[-1]
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
        record = {"step": event.step}
        if event.epochs_done is not None:
            record["epoch"] = round(event.epochs_done, 6)
        record |= metrics | {"elapsed_s": time.monotonic() - self._start_s}
        # JSON has no NaN; a value that is not finite is written as null.
        plain = {n: v if math.isfinite(v) else None for n, v in record.items()}
        self.history.append(plain)
        self._write(_line(plain))
        for listener in self.listeners:
            listener(record)

    def _restore(self) -> None:
        """Makes the file hold the history, and nothing behind it."""
        lines = b"".join(map(_line, self.history))
        self._offset = len(lines)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = self.path.read_bytes()[: len(lines)] if self.path.exists() else b""
        if there != lines:
            atomic_write(self.path, lines)
        self._write(b"")

    def _write(self, line: bytes) -> None:
        """Appends to what this run has written; what lies behind that is cut off."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.seek(file.truncate(min(self._offset, os.path.getsize(self.path))))
            file.write(line)
            self._offset = file.tell()


@contextlib.contextmanager
def exclude_from_timing(event: Event) -> Iterator[None]:
    """What happens within is no time of updates."""
    callbacks = getattr(event.trainer, "callbacks", ())
    logs = [callback for callback in callbacks if isinstance(callback, MetricsLog)]
    for log in logs:
        log.sync()
    yield
    for log in logs:
        log.restart_clock()


def _line(record: dict) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
