"""Tells a `TrainingStatusWriter` where a run is."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from relax.callbacks.metrics import MetricsLog
from relax.files import list_steps
from relax.monitor.status import TrainingStatusWriter
from relax.trainers.callback import Callback, Event

_SHOWN = ("loss", "learning_rate", "tokens_per_second", "reward")


class Status(Callback):
    """Keeps status files up to date, and the seconds that a run has spent in each phase.

    Its method `show` is to be a listener of `MetricsLog`, where loss and learning rate come from.
    To be the last callback: what the others do in an evaluation counts as evaluating.

    Args:
      writers: of the files.
      checkpoints: the directory that they are written to; None: none is told of.
    """

    def __init__(self, writers: Sequence[TrainingStatusWriter], checkpoints=None):
        self.writers, self.checkpoints = list(writers), checkpoints
        self.seconds: dict[str, float] = {}
        self._phase, self._since_s = "starting", time.monotonic()
        self._shapes: set[str] = set()
        self._begun: tuple[int, float] | None = None
        self._untimed_s = 0.0  # compiling, evaluating and saving, which time left leaves out

    def update(self, force: bool = False, **fields) -> None:
        """Gives fields to all writers."""
        for writer in self.writers:
            writer.update(force, **fields)

    def enter(self, phase: str, **fields) -> None:
        """Counts the time up to here to the phase that ends, and tells of the new one."""
        now_s = time.monotonic()
        spent_s = now_s - self._since_s
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent_s
        if self._phase != "training":
            self._untimed_s += spent_s
        self._phase, self._since_s = phase, now_s
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        self.update(phase=phase, seconds=seconds, **fields)

    def show(self, record: dict) -> None:
        """Takes a record of `MetricsLog`, as one of its listeners."""
        if any(name.startswith("eval_") for name in record):
            self.update(evaluation=record)
        else:
            shown = {name: record[name] for name in _SHOWN if name in record}
            self.update(metrics=record, step=record["step"], **shown)

    def on_train_begin(self, event: Event) -> None:
        self._begun = (event.step, time.monotonic())
        self._untimed_s = 0.0
        self.enter("training", **_where(event))

    def on_batch_begin(self, event: Event) -> None:
        shape = str(jax.tree.map(np.shape, event.batch))
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.enter("compiling")

    def on_batch_end(self, event: Event) -> None:
        if self._phase == "compiling":
            jax.block_until_ready(event.metrics)
            self.enter("training")
        self.update(**_where(event), time_left_s=self._time_left_s(event))

    def on_validation_begin(self, event: Event) -> None:
        self.enter("evaluating")

    def on_validation_end(self, event: Event) -> None:
        # An evaluation outside of `train` ends no phase of a run.
        self.enter("evaluating" if event.epoch is None else "training")
        _restart_clocks(event)

    def on_save(self, event: Event) -> None:
        self._tell_checkpoint()
        _restart_clocks(event)

    def on_train_end(self, event: Event) -> None:
        self._tell_checkpoint()
        self.enter("finishing", **_where(event), time_left_s=0.0)

    def _tell_checkpoint(self) -> None:
        """As the disk has it: one that was begun may still be under way."""
        steps = [] if self.checkpoints is None else list_steps(self.checkpoints)
        if steps:
            path = str(Path(self.checkpoints) / str(steps[-1]))
            self.update(force=True, last_checkpoint={"step": steps[-1], "path": path})

    def _time_left_s(self, event: Event) -> float | None:
        if self._begun is None or event.total_steps is None:
            return None
        first, begun_s = self._begun
        done = event.step - first
        spent_s = time.monotonic() - begun_s - self._untimed_s
        if not done:
            return None
        return round(max(spent_s, 0.0) / done * (event.total_steps - event.step), 3)


def _restart_clocks(event: Event) -> None:
    """What other callbacks did after an evaluation or a save is not the time of updates."""
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
