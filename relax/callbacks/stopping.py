"""Callbacks that compare evaluations: early stopping and the best checkpoint."""

import math
from pathlib import Path
from typing import Any, Literal

from relax.checkpoint.checkpointer import Checkpointer
from relax.errors import ConfigError
from relax.trainers.callback import Callback, Event, StopTraining, state_dicts

Mode = Literal["min", "max"]


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether a value improves on the best by more than `min_delta`; NaN never does.

    >>> is_better(0.5, 0.6, "min"), is_better(0.5, 0.6, "min", 0.2)
    (True, False)
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    return best - value > min_delta if mode == "min" else value - best > min_delta


def metric_of(event: Event, name: str) -> float:
    """Looks up a metric of an evaluation by its name, with or without the prefix `eval_`.

    Raises:
      ConfigError: there is no such metric; the message lists the existing ones.
    """
    for known in (name, name.removeprefix("eval_")):
        if known in event.metrics:
            return float(event.metrics[known])
    there = ", ".join(f"eval_{known}" for known in event.metrics)
    raise ConfigError(
        f"metric_for_best_model must be a metric of the evaluation, got {name!r}. Name one of: "
        f"{there}."
    )


class EarlyStopping(Callback):
    """Stops a run whose evaluations no longer improve.

    Args:
      metric: the metric to compare, such as `eval_loss`.
      patience: number of evaluations in a row without improvement that ends the run (>= 1).
      min_delta: smallest difference that counts as an improvement (>= 0, exclusive).
      mode: "min" if smaller values are better, "max" if larger ones are.

    Attributes:
      best: the best value so far, or None.
      waited: evaluations since the best one.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Mode = "min",
    ):
        if patience < 1 or min_delta < 0 or mode not in ("min", "max"):
            raise ConfigError(
                "EarlyStopping takes patience >= 1, min_delta >= 0 and mode min or max, got "
                f"{patience}, {min_delta} and {mode!r}."
            )
        self.metric, self.patience, self.min_delta, self.mode = metric, patience, min_delta, mode
        self.best: float | None = None
        self.waited = 0

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self.best, self.waited = None, 0
        elif self.waited >= self.patience:
            raise StopTraining  # the resumed run had already stopped

    def on_validation_end(self, event: Event) -> None:
        if event.epoch is None:
            return  # an evaluation outside training
        value = metric_of(event, self.metric)
        if is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            raise StopTraining

    def state_dict(self) -> dict:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.waited = state["best"], state["waited"]


class BestCheckpoint(Callback):
    """Keeps a checkpoint of the state with the best evaluation, which runs can resume from.

    It comes after all other callbacks with state, since it saves their state.

    Args:
      directory: the checkpoint is `<directory>/<step>`.
      metric, mode: as for `EarlyStopping`.
      saver: has `save(step, state, progress)`; None: a `Checkpointer` that keeps one checkpoint.

    Attributes:
      step: the step of the best state, or None.
      metrics: the metrics of its evaluation.
    """

    def __init__(
        self,
        directory: str | Path,
        metric: str = "eval_loss",
        mode: Mode = "min",
        saver: Any = None,
    ):
        self.directory, self.metric, self.mode = Path(directory), metric, mode
        self.saver = saver or Checkpointer(self.directory, save_total_limit=1)
        self.best: float | None = None
        self.step: int | None = None
        self.metrics: dict[str, float] = {}

    @property
    def path(self) -> Path | None:
        """The directory of the best checkpoint, or None."""
        return None if self.step is None else self.directory / str(self.step)

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self.best, self.step, self.metrics = None, None, {}

    def on_validation_end(self, event: Event) -> None:
        if event.epoch is None:
            return
        value = metric_of(event, self.metric)
        if not is_better(value, self.best, self.mode):
            return
        self.best, self.step, self.metrics = value, event.step, dict(event.metrics)
        progress: dict[str, Any] = {
            "epoch": event.epoch,
            "position": event.position,
            "evaluated": event.step,
        }
        progress["callbacks"] = state_dicts(event.trainer.callbacks)
        self.saver.save(event.step, event.state, progress)

    def state_dict(self) -> dict:
        return {"best": self.best, "step": self.step, "metrics": self.metrics}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.step, self.metrics = state["best"], state["step"], state["metrics"]
