"""metrics.jsonl: a line every `logging_steps` updates, one per evaluation, each exactly once."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from relax.trainers.callback import Callback, Event

# Fields that depend on the clock: everything else is the same in every run of a configuration.
CLOCK_FIELDS = ("tokens_per_second", "elapsed_s")


class MetricsLog(Callback):
    """Averages metrics over the logging window and writes them to a file.

    Floating-point metrics are means over the window's updates; integer ones are counts, summed
    over the whole run. A resumed run cuts the file back to where its checkpoint was taken.

    Args:
      path: the file; None: nothing is written.
      logging_steps: updates per line (>= 1).
      listeners: each is called with every record, a dict of numbers.
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
        self._offset: int | None = None  # bytes of the file that belong to this run
        self._shapes: set = set()
        self._spent_s, self._timed_tokens = 0.0, 0

    def on_train_begin(self, event: Event) -> None:
        self._start_s = self._clock_s = time.monotonic()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(min(self._offset or 0, os.path.getsize(self.path)))

    def on_batch_begin(self, event: Event) -> None:
        self._begin_s = time.monotonic()

    def on_batch_end(self, event: Event) -> None:
        self._window.append(event.metrics)
        self._time(event)
        if event.step % self.logging_steps == 0:
            self._log_window(event)

    def on_train_end(self, event: Event) -> None:
        if self._window:
            self._log_window(event)

    def on_validation_begin(self, event: Event) -> None:
        self._begin_s = time.monotonic()
        self._settle()

    def on_validation_end(self, event: Event) -> None:
        seconds = time.monotonic() - self._begin_s
        metrics = {f"eval_{name}": value for name, value in event.metrics.items()}
        self._emit(event, metrics | {"elapsed_s": seconds})
        self._clock_s = time.monotonic()

    def state_dict(self) -> dict:
        self._settle()
        return {"counts": self.counts, "window": self._window, "offset": self._offset or 0}

    def load_state_dict(self, state: dict) -> None:
        self.counts, self._offset = dict(state["counts"]), state["offset"]
        self._window = list(state["window"])

    def _time(self, event: Event) -> None:
        """Keeps compiling, evaluating and saving out of the tokens per second."""
        shape = str(jax.tree.map(np.shape, event.batch))
        if shape not in self._shapes:
            self._shapes.add(shape)
            jax.block_until_ready(event.metrics)
            self._spent_s += self._begin_s - self._clock_s
            self._clock_s = time.monotonic()
        else:
            self._timed_tokens += int(event.metrics.get("num_tokens", 0))

    def _settle(self) -> None:
        """Fetches what is still on the device and stops the clock until the next update."""
        fetched = jax.device_get(self._window)
        self._window = [
            {name: np.asarray(value).item() for name, value in metrics.items()}
            for metrics in fetched
        ]
        now_s = time.monotonic()
        self._spent_s += now_s - self._clock_s
        self._clock_s = now_s

    def _log_window(self, event: Event) -> None:
        self._settle()
        record = {}
        for name in self._window[0]:
            values = [metrics[name] for metrics in self._window]
            if isinstance(values[0], int):
                self.counts[name] = self.counts.get(name, 0) + sum(values)
                record[name] = self.counts[name]
            else:
                record[name] = math.fsum(values) / len(values)
        if self._timed_tokens:
            record["tokens_per_second"] = self._timed_tokens / max(self._spent_s, 1e-9)
        record["elapsed_s"] = time.monotonic() - self._start_s
        self._window, self._spent_s, self._timed_tokens = [], 0.0, 0
        self._emit(event, record)

    def _emit(self, event: Event, metrics: dict) -> None:
        record = {"step": event.step, "epoch": round(event.epochs_done, 6), **metrics}
        if self.path is not None:
            # JSON has no NaN; a value that is not finite is written as null.
            plain = {n: v if math.isfinite(v) else None for n, v in record.items()}
            with open(self.path, "ab") as file:
                file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
                self._offset = file.tell()
        for listener in self.listeners:
            listener(record)
