"""The trainer: one compiled update over an immutable state, and the loop around it.

1. `create_train_state(key)` makes params, optimizer state and the root key.
2. For every item of the loader, `make_batches(state, item)` gives the batches of its updates.
3. `train_step(state, batch)` makes one update: loss, gradient, clipping, optimizer, counter.
4. Callbacks see the metrics; validation and checkpoints follow where they are due.

Nothing that training changes lives outside `TrainState` and the position in the data: the key of
update n is `fold_in(state.rng, n)`, and no attribute of a trainer changes while it trains.
"""

import abc
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from relax import fault, parallel
from relax.models.trainable import merge
from relax.optimizers import optimizers as optimizers
from relax.trainers import callback as hooks
from relax.trainers import evaluation
from relax.trainers.callback import Event
from relax.trainers.interrupt import Interrupt
from relax.trainers.items import items_of
from relax.trainers.state import TrainState
from relax.trainers.update import (
    LossOutput,
    accumulate_gradients,
    apply_gradients,
    as_loss_output,
    clip_scale,
    reduce_metrics,
)


class LoggedBatch(NamedTuple):
    """A batch, and what is to be logged with its update.

    Attributes:
      batch: what `train_step` eats.
      metrics: numbers by name: floats are averaged, integers are counted.
      records: anything that callbacks show or keep, such as sampled texts.
    """

    batch: Any
    metrics: dict[str, float | int] = {}
    records: Any = ()


class Trainer(abc.ABC):
    """Base of all algorithms. A subclass supplies `create_train_state` and `compute_loss`.

    Args:
      model: anything the subclass's loss knows how to apply; a Flax module as a rule.
      optimizer: an optax transformation. Where it holds its learning rate in its state
        (`optax.inject_hyperparams`), the rate is among the metrics.
      gradient_accumulation_steps: micro-batches that one batch is cut into, along axis 0.
      max_grad_norm: gradients of a larger global norm are scaled down to it; None or 0: never.
      callbacks: see `relax.callbacks`.
    """

    def __init__(
        self,
        model,
        optimizer: optax.GradientTransformation,
        *,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        callbacks: Iterable = (),
    ):
        if gradient_accumulation_steps < 1:
            raise ValueError(
                "gradient_accumulation_steps must be at least 1, got "
                f"{gradient_accumulation_steps}. 1 takes a batch as a whole."
            )
        self.model = model
        self.optimizer = optimizer
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.callbacks = tuple(callbacks)
        wanted = inspect.signature(self.compute_loss).parameters
        self._extras = tuple(name for name in ("rng", "frozen") if name in wanted)
        # Compiled per trainer, so that compiled code goes when the trainer goes.
        self.train_step = jax.jit(self.train_step, donate_argnums=0)
        self.eval_step = jax.jit(self.eval_step)

    @abc.abstractmethod
    def create_train_state(self, key: jax.Array) -> TrainState:
        """The state before the first update."""

    @abc.abstractmethod
    def compute_loss(self, params, batch) -> jax.Array | LossOutput:
        """The loss of one micro-batch: pure, a scalar mean or a `LossOutput`.

        A subclass may name a parameter `rng` (the update's key; None when validating) and a
        parameter `frozen` (`state.frozen`).
        """

    def make_batches(self, state: TrainState, item) -> Iterable:
        """The batches to train on, from one item of the loader; here the item itself.

        What has numbers of its own to log yields `LoggedBatch` batches. The first update donates
        `state`: all that is read of it is read before the first batch is given.
        """
        return (item,)

    @property
    def updates_per_item(self) -> int:
        """How many batches `make_batches` gives per item of the loader."""
        return 1

    def update_frozen(self, frozen, params, step: jax.Array):
        """What `state.frozen` is after update `step`, inside the compiled step; here the same."""
        return frozen

    def model_params(self, params, frozen):
        """All parameters of the model that is trained, from a state's: what writes and is saved."""
        return merge(params, frozen)

    def train_step(self, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. Compiled once per batch shape; `state` is donated.

        Returns:
          The new state and scalars: the loss's metrics, `grad_norm` before clipping,
          `skipped_steps` (1 where the gradient was not finite and nothing changed), and
          `learning_rate` where the optimizer tells one.
        """
        rng = jax.random.fold_in(state.rng, state.step)

        def loss_fn(params, micro_batch, index):
            key = jax.random.fold_in(rng, index)
            return self._loss(params, micro_batch, rng=key, frozen=state.frozen)

        gradients, metrics = accumulate_gradients(
            loss_fn, state.params, batch, self.gradient_accumulation_steps
        )
        grad_norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        scale = clip_scale(grad_norm, self.max_grad_norm)
        params, opt_state = apply_gradients(
            self.optimizer, gradients, state.params, state.opt_state, finite, scale
        )
        metrics |= {"grad_norm": grad_norm, "skipped_steps": 1 - finite.astype(jnp.int32)}
        if (rate := optimizers.learning_rate(opt_state)) is not None:
            metrics["learning_rate"] = rate
        step = state.step + 1
        frozen = self.update_frozen(state.frozen, params, step)
        state = state.replace(step=step, params=params, opt_state=opt_state, frozen=frozen)
        return parallel.constrain_tree(state), metrics

    def eval_step(self, params, frozen, batch) -> LossOutput:
        """The loss of one batch without a gradient."""
        return as_loss_output(self._loss(params, batch, rng=None, frozen=frozen))

    def _loss(self, params, batch, **extras):
        return self.compute_loss(params, batch, **{name: extras[name] for name in self._extras})

    def validate(
        self, state: TrainState, loader, max_batches: int | None = None
    ) -> evaluation.Evaluation:
        """Loss and metrics over a loader, weighted by items; no gradient, no dropout.

        Args:
          state: its `eval_params` are read, nothing is changed or donated.
          loader: an iterable of batches, or several by name, whose metrics are then given by name
            (`hard_loss`) and overall (`loss`).
          max_batches: stop after so many of a loader; None takes all.

        Returns:
          Numbers by name, `loss` among them; its attribute `batches` has those of every batch.

        Raises:
          ValueError: if a loader gave no batch.
        """
        event = Event(self, state, int(state.step))
        hooks.call(self.callbacks, "on_validation_begin", event)
        metrics = self._evaluate(state, loader, max_batches)
        event = dataclasses.replace(event, metrics=metrics)
        hooks.call(self.callbacks, "on_validation_end", event)
        return metrics

    def _evaluate(self, state: TrainState, loader, max_batches: int | None):
        items = functools.partial(items_of, epoch=0, start=0)
        return evaluation.evaluate(self, state, loader, max_batches, items)

    def evaluate_item(self, state: TrainState, params, item, index: int) -> Any:
        """What an item of an evaluation loader gives; `params` are the state's `eval_params`.

        It may be a function that is called for it when the other items are under way too.
        """
        return jax.device_get(self.eval_step(params, state.frozen, parallel.shard_batch(item)))

    def reduce_evaluation(self, parts: list) -> dict[str, float]:
        """The metrics of all that `evaluate_item` gave."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        return {name: value.item() for name, value in reduce_metrics(stacked).items()}

    def test(self, state: TrainState, loader, max_batches: int | None = None) -> dict:
        """As `validate`, under the name that reports use for the last, untouched set."""
        return self.validate(state, loader, max_batches)

    def train(
        self,
        train_loader,
        num_epochs: int = 1,
        key: jax.Array | None = None,
        *,
        state: TrainState | None = None,
        progress: dict | None = None,
        max_steps: int | None = None,
        eval_loader=None,
        eval_steps: int | None = None,
        eval_on_start: bool = False,
        max_eval_batches: int | None = None,
        checkpointer=None,
        save_steps: int | None = None,
    ) -> TrainState:
        """Trains and returns the final state.

        Ctrl-C or SIGTERM finishes the current item, saves where there is a checkpointer, and
        returns a usable state; `train(..., state=state)` goes on from it as if nothing had been.

        Args:
          train_loader: an `OrderedLoader`, or any iterable of batches that can be iterated anew.
          num_epochs: passes over the loader (>= 1).
          key: the root key; not needed with `state`.
          state: where to go on from. It is donated.
          progress: what the checkpoint of `state` holds; without it the position follows from
            `state.step` and `updates_per_item`.
          max_steps: stop when so many updates are done in all, and the item under way is.
          eval_loader, eval_steps, max_eval_batches: validate every `eval_steps` updates (None: at
            the end of every epoch; 0: not), and at the end of the run.
          eval_on_start: and before the first update.
          checkpointer: has `save(step, state, progress)` and `wait()`, see `relax.checkpoint`.
            Saves at the end and, with `save_steps`, every so many updates (0: at the end of every
            epoch); when `train` returns, all is committed.

        Raises:
          ValueError: neither `key` nor `state`, or both; or the loader gave nothing to train on.
        """
        if (state is None) == (key is None):
            raise ValueError(
                "train needs either a key, such as jax.random.key(0), to begin with, or a state to "
                f"go on from, got {'neither' if key is None else 'both'}. A state holds its key."
            )
        if state is None:
            state = self.create_train_state(key)
        run = _Run(
            self, train_loader, num_epochs, max_steps, eval_loader, eval_steps, eval_on_start,
            max_eval_batches, checkpointer, save_steps,
        )  # fmt: skip
        with Interrupt() as interrupt, contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.close)
            if checkpointer is not None:
                stack.callback(checkpointer.wait)
            interrupt.arm()
            return run(state, progress, interrupt)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The loop of `Trainer.train`: batch, step, metrics, callbacks, validation, checkpoint."""

    trainer: Trainer
    loader: Any
    num_epochs: int
    max_steps: int | None
    eval_loader: Any
    eval_steps: int | None
    eval_on_start: bool
    max_eval_batches: int | None
    checkpointer: Any
    save_steps: int | None

    def __call__(self, state, progress, interrupt) -> TrainState:
        event = self._start(state, progress)
        saved = None if progress is None else event.step
        event = self._call("on_train_begin", event)
        if self.eval_on_start and event.step == 0:
            event = self._validate(event)
        while event.epoch < self.num_epochs and not self._ended(event, interrupt):
            if event.position == 0:
                event = self._call("on_epoch_begin", event)
            for item in items_of(self.loader, event.epoch, event.position):
                if self._ended(event, interrupt):
                    break
                before = event.step
                event = self._train_on(event, item)
                if _due(self.eval_steps, before, event.step):
                    event = self._validate(event)
                if _due(self.save_steps, before, event.step):
                    event, saved = self._save(event), event.step
                fault.point("step")
            else:
                event = self._end_epoch(event)
                if self.save_steps == 0:
                    event, saved = self._save(event), event.step
        if interrupt.requested is None:
            event = self._validate(event)
        if self.checkpointer is not None and saved != event.step:
            event = self._save(event)
        if self.checkpointer is not None:
            self.checkpointer.wait()
        self._call("on_train_end", event)
        return event.state

    def _start(self, state, progress) -> Event:
        length = len(self.loader) if hasattr(self.loader, "__len__") else None
        step = int(state.step)
        updates = self.trainer.updates_per_item
        if progress is None:
            items = step // updates
            epoch, position = divmod(items, length) if length else (0, items)
            progress = {"epoch": epoch, "position": position}
        hooks.load_state_dicts(self.trainer.callbacks, progress.get("callbacks", {}))
        limits = [length * self.num_epochs * updates] if length else []
        limits += [] if self.max_steps is None else [self.max_steps]
        return Event(
            self.trainer,
            state,
            step,
            epoch=progress["epoch"],
            position=progress["position"],
            epoch_length=length,
            total_steps=min(limits, default=None),
            evaluated=progress.get("evaluated"),
        )

    def _ended(self, event: Event, interrupt) -> bool:
        interrupt.agree()
        enough = self.max_steps is not None and event.step >= self.max_steps
        return enough or event.stop or interrupt.requested is not None

    def _call(self, hook: str, event: Event) -> Event:
        stop = hooks.call(self.trainer.callbacks, hook, event)
        return dataclasses.replace(event, stop=event.stop or stop)

    def _train_on(self, event: Event, item) -> Event:
        event = dataclasses.replace(event, position=event.position + 1)
        for given in self.trainer.make_batches(event.state, item):
            note = given if isinstance(given, LoggedBatch) else LoggedBatch(given)
            event = dataclasses.replace(event, batch=note.batch, records=note.records)
            event = self._call("on_batch_begin", event)
            rows = parallel.shard_batch(note.batch)
            state, metrics = self.trainer.train_step(event.state, rows)
            metrics |= note.metrics
            event = dataclasses.replace(event, state=state, step=event.step + 1, metrics=metrics)
            event = self._call("on_batch_end", event)
        return dataclasses.replace(event, batch=None, records=(), metrics={})

    def _end_epoch(self, event: Event) -> Event:
        if event.position == 0:
            raise ValueError(
                f"the train loader gave no batch in epoch {event.epoch}. Pass something that can "
                "be iterated anew for every epoch, such as a list; a generator runs out."
            )
        event = self._call("on_epoch_end", event)
        if self.eval_steps is None:
            event = self._validate(event)
        return dataclasses.replace(event, epoch=event.epoch + 1, position=0)

    def _validate(self, event: Event) -> Event:
        if self.eval_loader is None or event.evaluated == event.step:
            return event
        event = self._call("on_validation_begin", event)
        metrics = self.trainer._evaluate(event.state, self.eval_loader, self.max_eval_batches)
        event = self._call("on_validation_end", dataclasses.replace(event, metrics=metrics))
        return dataclasses.replace(event, metrics={}, evaluated=event.step)

    def _save(self, event: Event) -> Event:
        progress = {name: getattr(event, name) for name in ("epoch", "position", "evaluated")}
        progress["callbacks"] = hooks.state_dicts(self.trainer.callbacks)
        self.checkpointer.save(event.step, event.state, progress)
        return self._call("on_save", event)


def _due(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return bool(every) and after // every > before // every
