"""Callbacks: hooks called during training, for progress, metrics and early stopping."""

import dataclasses
import warnings
from typing import Any

from relax.errors import ResumeError


class StopTraining(Exception):
    """Raised by a callback to end the run normally after the current step, with a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Event:
    """The position and results of a run, passed to every hook.

    Attributes:
      trainer: the running trainer.
      state: the `TrainState`. The next step donates its buffers: copy anything you keep.
      step: updates done.
      epoch: the current epoch, counted from 0; None in a validation outside training.
      position: loader items of this epoch that are done; the batch hooks count the current one.
      epoch_length: loader items per epoch; None if the loader has no length.
      total_steps: updates of the whole run; None if unknown.
      batch: the batch, in `on_batch_begin` and `on_batch_end`.
      records: records of a `LoggedBatch`, to show with the batch.
      evaluated: the step of the last validation, if any.
      stop: whether a callback asked to end the run.
      metrics: scalars (device arrays) of the update in `on_batch_end`; floats of the whole
        evaluation in `on_validation_end`.
    """

    trainer: Any
    state: Any
    step: int
    epoch: int | None = None
    position: int = 0
    epoch_length: int | None = None
    total_steps: int | None = None
    batch: Any = None
    records: Any = ()
    evaluated: int | None = None
    stop: bool = False
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def epochs_done(self) -> float | None:
        """Epochs done, including the fraction of the current one if the loader has a length."""
        if self.epoch is None:
            return None
        return self.epoch + (self.position / self.epoch_length if self.epoch_length else 0.0)


class Callback:
    """Base class of callbacks. Every hook does nothing; override those you need.

    A callback that keeps state returns it from `state_dict` (JSON); it is saved with every
    checkpoint and restored by `load_state_dict`. `close` is called whenever `train` ends, even by
    an exception: release there what `on_train_begin` acquired.
    """

    def on_train_begin(self, event: Event) -> None: ...

    def on_train_end(self, event: Event) -> None: ...

    def on_epoch_begin(self, event: Event) -> None: ...

    def on_epoch_end(self, event: Event) -> None: ...

    def on_batch_begin(self, event: Event) -> None: ...

    def on_batch_end(self, event: Event) -> None: ...

    def on_scored(self, scored) -> None:
        """A rollout has its rewards, a `ScoredRollout`; the updates made of it follow."""

    def on_validation_begin(self, event: Event) -> None: ...

    def on_validation_end(self, event: Event) -> None: ...

    def evaluate(self, event: Event) -> dict[str, float]:
        """Metrics to add to those of an evaluation, before `on_validation_end`."""
        return {}

    def on_save(self, event: Event) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def close(self) -> None: ...


def call(hook: str, event: Event) -> Event:
    """Calls one hook of the trainer's callbacks in order; their name is added to an exception.

    Returns:
      The event, with `stop` set if one of them asked to end the run.
    """
    stop = event.stop
    for callback in event.trainer.callbacks:
        try:
            getattr(callback, hook)(event)
        except StopTraining:
            stop = True
        except Exception as error:
            error.add_note(f"raised by the callback {type(callback).__name__}.{hook}")
            raise
    return dataclasses.replace(event, stop=stop)


def evaluations(event: Event) -> dict[str, float]:
    """The metrics that the trainer's callbacks add to an evaluation."""
    found: dict[str, float] = {}
    for callback in event.trainer.callbacks:
        found |= callback.evaluate(event)
    return found


def state_dicts(callbacks) -> dict[str, dict]:
    """The states of all callbacks that have one, keyed by class name and index, as "Best.0"."""
    states = {name: callback.state_dict() for name, callback in _named(callbacks)}
    return {name: state for name, state in states.items() if state}


def load_state_dicts(callbacks, states: dict[str, dict]) -> None:
    """Restores the states that `state_dicts` returned; warns of those that no callback has.

    Raises:
      ResumeError: a callback cannot read its state, as that of another version.
    """
    left = dict(states)
    for name, callback in _named(callbacks):
        if name not in left:
            continue
        try:
            callback.load_state_dict(left.pop(name))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ResumeError(
                f"the checkpoint's state of the callback {name} cannot be read ({reason}): resume "
                "with the version that wrote it, or start a new run from the exported model."
            ) from error
    if left:
        warnings.warn(
            f"the checkpoint has states of callbacks that this run lacks: {', '.join(left)}. "
            "They are dropped.",
            stacklevel=2,
        )


def _named(callbacks):
    seen: dict[str, int] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] = seen.get(kind, -1) + 1
        yield f"{kind}.{seen[kind]}", callback
