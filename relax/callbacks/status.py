"""Status callback: updates the status files of a run."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relax.callbacks.metrics import MetricsLog
from relax.callbacks.progress import TimeLeft
from relax.files import list_steps
from relax.monitor.status import TrainingStatusWriter
from relax.trainers.callback import Callback, Event

_SHOWN = ("loss", "learning_rate", "tokens_per_second", "reward")


class Status(Callback):
    """Updates status files, including the seconds spent in each phase.

    Its method `show` is a listener of `MetricsLog`, which supplies loss and learning rate. It is
    the last callback, so that the work of others during an evaluation counts as evaluation.

    Args:
      writers: the writers of the files.
      checkpoints: the directory of the run's checkpoints; None: none to report.
    """

    def __init__(self, writers: Sequence[TrainingStatusWriter], checkpoints=None):
        self.writers, self.checkpoints = list(writers), checkpoints
        self.seconds: dict[str, float] = {}
        self.results: dict[str, float] = {}
        self._phase, self._since_s = "starting", time.monotonic()
        self._shapes: set[str] = set()
        self._left = TimeLeft()

    def update(self, force: bool = False, **fields) -> None:
        """Passes fields to all writers."""
        for writer in self.writers:
            writer.update(force, **fields)

    def add_results(self, metrics: dict[str, float]) -> None:
        """Adds metrics measured once, such as those before and after training."""
        self.results |= metrics
        self.update(force=True, results=self.results)

    def take_over(self, old: Mapping[str, Any]) -> None:
        """Adds the results and the times of the earlier part of a resumed run, from its file."""
        results, seconds = old.get("results"), old.get("seconds")
        self.results = dict(results) if isinstance(results, Mapping) else {}
        for phase, value in seconds.items() if isinstance(seconds, Mapping) else ():
            if isinstance(value, int | float):
                self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def enter(self, phase: str, **fields) -> None:
        """Ends the current phase, adds its time, and starts another."""
        now_s = time.monotonic()
        spent_s = now_s - self._since_s
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent_s
        if phase == "training":
            self._left.start()
        else:
            self._left.pause()
        self._phase, self._since_s = phase, now_s
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        self.update(phase=phase, seconds=seconds, **fields)

    def show(self, record: dict) -> None:
        """Shows one record of `MetricsLog`."""
        if any(name.startswith("eval_") for name in record):
            self.update(evaluation=record)
        else:
            shown = {name: record[name] for name in _SHOWN if name in record}
            self.update(metrics=record, step=record["step"], **shown)

    def on_train_begin(self, event: Event) -> None:
        self._left = TimeLeft()
        self.enter("training", **_where(event))

    def on_batch_begin(self, event: Event) -> None:
        shape = str(jax.tree.map(np.shape, event.batch))
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.enter("compiling")

    def on_batch_end(self, event: Event) -> None:
        if self._phase == "compiling":
            jax.block_until_ready(event.metrics)
            if len(self._shapes) == 1:  # the first rollout includes compilation
                self._left = TimeLeft()
            self.enter("training", compilations=len(self._shapes))
        else:
            self._left.count()
        left = self._left.seconds(event.total_steps and event.total_steps - event.step)
        self.update(**_where(event), time_left_s=None if left is None else round(left, 3))

    def on_validation_begin(self, event: Event) -> None:
        self.enter("evaluating")

    def on_validation_end(self, event: Event) -> None:
        # An evaluation outside `train` does not end a phase.
        self.enter("evaluating" if event.epoch is None else "training")
        _restart_clocks(event)

    def on_save(self, event: Event) -> None:
        self._report_checkpoint()
        _restart_clocks(event)

    def on_train_end(self, event: Event) -> None:
        self._report_checkpoint()
        self.enter("finishing", **_where(event), time_left_s=0.0)

    def _report_checkpoint(self) -> None:
        """Reports the newest checkpoint on disk; the last one may not be committed yet."""
        steps = [] if self.checkpoints is None else list_steps(self.checkpoints)
        if steps:
            path = str(Path(self.checkpoints) / str(steps[-1]))
            self.update(force=True, last_checkpoint={"step": steps[-1], "path": path})


def _restart_clocks(event: Event) -> None:
    """Excludes the work of other callbacks after an evaluation or a save from update times."""
    for callback in getattr(event.trainer, "callbacks", ()):
        if isinstance(callback, MetricsLog):
            callback.restart_clock()


def _where(event: Event) -> dict:
    epoch = event.epochs_done
    return {
        "step": event.step,
        "total_steps": event.total_steps,
        "epoch": None if epoch is None else round(epoch, 4),
    }
