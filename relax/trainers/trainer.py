"""The trainer: one compiled update over an immutable state, and the loop around it.

1. `create_train_state(key)` makes the parameters, the optimizer state and the root key.
2. For every item of the loader, `make_batches(state, item)` yields the batches of its updates.
3. `train_step(state, batch)` makes one update: loss, gradient, clipping, optimizer, counter.
4. Callbacks receive the metrics; then validation and checkpoints run if they are due.

Training changes only the `TrainState` and the position in the data: the key of update n is
`fold_in(state.rng, n)`, and no attribute of a trainer changes while it trains.
"""

import abc
import contextlib
import functools
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from relax import parallel
from relax.models.trainable import merge
from relax.optimizers import optimizers
from relax.trainers import callback as hooks
from relax.trainers.callback import Event
from relax.trainers.evaluation import Evaluation, evaluate
from relax.trainers.interrupt import Interrupt, Interrupted
from relax.trainers.items import is_due, items_of, require_items
from relax.trainers.sources import without_absent
from relax.trainers.state import TrainState, copy_tree
from relax.trainers.update import (
    LossOutput,
    accumulate_gradients,
    apply_gradients,
    as_loss_output,
    clip_scale,
    reduce_metrics,
)


class LoggedBatch(NamedTuple):
    """A batch plus metrics and records to log with its step.

    Attributes:
      batch: the argument of `train_step`.
      metrics: numbers by name; floats are averaged over a logging window, integers are summed.
      records: objects for callbacks to show or keep, such as sampled texts.
    """

    batch: Any
    metrics: dict[str, float | int] = {}
    records: Any = ()


class Trainer(abc.ABC):
    """Base class of all algorithms. A subclass supplies `create_train_state` and `compute_loss`.

    Args:
      model: the model that the subclass's loss applies, usually a Flax module.
      optimizer: an optax transformation. If its state holds the learning rate
        (`optax.inject_hyperparams`), the rate is logged.
      params: pretrained parameters for `create_train_state`; None: random initialisation.
      donate_params: the first state takes over the memory of `params`, and the first step donates
        it. False copies them, so that the caller keeps a usable tree.
      gradient_accumulation_steps: micro-batches that a batch is split into, along axis 0.
      max_grad_norm: upper bound of the global gradient norm; None or 0: no clipping.
      callbacks: see `relax.callbacks`.

    Attributes:
      train_step: `update`, compiled once per batch shape; the state is donated.
      eval_step: `evaluate_batch`, compiled once per batch shape.
    """

    def __init__(
        self,
        model,
        optimizer: optax.GradientTransformation,
        *,
        params=None,
        donate_params: bool = False,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        callbacks: Iterable = (),
    ):
        if gradient_accumulation_steps < 1:
            raise ValueError(
                "gradient_accumulation_steps must be at least 1, got "
                f"{gradient_accumulation_steps}. Use 1 for no accumulation."
            )
        self.model = model
        self.optimizer = optimizer
        self.params = params
        self.donate_params = donate_params
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.callbacks = tuple(callbacks)
        wanted = inspect.signature(self.compute_loss).parameters
        self._extras = tuple(name for name in ("rng", "frozen") if name in wanted)
        # Compiled per trainer, so that compiled code is freed with the trainer.
        self.train_step = jax.jit(self.update, donate_argnums=0)
        self.eval_step = jax.jit(self.evaluate_batch)

    @abc.abstractmethod
    def create_train_state(self, key: jax.Array) -> TrainState:
        """The state before the first update."""

    @abc.abstractmethod
    def compute_loss(self, params, batch) -> jax.Array | LossOutput:
        """The loss of one micro-batch: pure, a scalar mean or a `LossOutput`.

        A subclass may name a parameter `rng` (the update's key; None when validating) and a
        parameter `frozen` (`state.frozen`).
        """

    def initial_params(self):
        """`params` for a new state, which donates them: a copy unless `donate_params`; or None."""
        return self.params if self.donate_params else copy_tree(self.params)

    def make_batches(self, state: TrainState, item) -> Iterable:
        """Yields the batches to train on, made from one loader item; here the item, packed.

        A subclass yields `LoggedBatch`es to log metrics of its own. Read everything you need from
        `state` before yielding the first batch; the first step donates its buffers.
        """
        return (self.pack(item),)

    def pack(self, item, blocks: int | None = None) -> Any:
        """The batch that `compute_loss` takes, made from a loader's item; here the item itself.

        Args:
          blocks: equal parts to divide the batch into; None: the micro-batches of an update times
            the devices that share each.
        """
        return item

    @property
    def num_blocks(self) -> int:
        """The micro-batches of an update times the devices that share each."""
        return self.gradient_accumulation_steps * parallel.batch_shards()

    @property
    def updates_per_item(self) -> int:
        """Number of batches that `make_batches` yields per loader item."""
        return 1

    def update_frozen(self, frozen, params, step: jax.Array):
        """`state.frozen` after update `step`, inside the compiled step; here unchanged."""
        return frozen

    def model_params(self, params, frozen):
        """All parameters of the trained model, for sampling and export."""
        return merge(params, frozen)

    def update(self, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update, as a pure function: loss, gradient, clipping, optimizer, counter.

        Returns:
          The new state and scalars: the loss's metrics, `grad_norm` before clipping,
          `skipped_steps` (1 if the gradient was not finite and nothing changed), and
          `learning_rate` if the optimizer's state holds one.
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
        state = replace(state, step=step, params=params, opt_state=opt_state, frozen=frozen)
        return parallel.constrain_tree(state), metrics

    def evaluate_batch(self, params, frozen, batch) -> LossOutput:
        """The loss of one batch without a gradient, as a pure function."""
        return as_loss_output(self._loss(params, batch, rng=None, frozen=frozen))

    def _loss(self, params, batch, **extras):
        return self.compute_loss(params, batch, **{name: extras[name] for name in self._extras})

    def validate(self, state: TrainState, loader, max_batches: int | None = None) -> Evaluation:
        """Computes loss and metrics over a loader, weighted by items, without dropout.

        Args:
          state: supplies `eval_params`; nothing is changed or donated.
          loader: an iterable of batches, or a mapping of names to several; then metrics come per
            name (`hard_loss`) and overall (`loss`).
          max_batches: maximum number of batches per loader; None: all.

        Returns:
          Metrics by name, including `loss`; the attribute `batches` has those of every batch.

        Raises:
          ValueError: if a loader gave no batch.
        """
        event = Event(self, state, int(state.step))
        return _validate(event, loader, max_batches)[1]

    def _evaluate(self, state, loader, max_batches: int | None) -> Evaluation:
        items = functools.partial(items_of, epoch=0, start=0)
        return evaluate(self, state, loader, max_batches, items)

    def evaluate_item(self, state: TrainState, params, item, index: int) -> Any:
        """Evaluates one item of an evaluation loader, for `reduce_evaluation`.

        The result may be a function without arguments, called after all items have started, so
        that rewards are computed while the next item is sampled.

        Args:
          params: the state's `eval_params`.
        """
        batch = parallel.shard_batch(self.pack(item, parallel.batch_shards()))
        return jax.device_get(self.eval_step(params, state.frozen, batch))

    def reduce_evaluation(self, parts: list) -> dict[str, float]:
        """Combines results of `evaluate_item` into metrics."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        return without_absent({n: v.item() for n, v in reduce_metrics(stacked).items()})

    def test(self, state: TrainState, loader, max_batches: int | None = None) -> dict:
        """The same as `validate`, for the held-out test set."""
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

        Ctrl-C or SIGTERM finishes the current item, saves if there is a checkpointer, and returns a
        usable state; `train(..., state=state)` resumes from it exactly. SIGTERM abandons a rollout
        or an evaluation in progress, which is repeated on resume.

        Args:
          train_loader: an `OrderedLoader`, or any iterable of batches that can be iterated again.
          num_epochs: passes over the loader (>= 1).
          key: the root key, for a fresh state.
          state: the state to continue from. It is donated.
          progress: the progress stored with the checkpoint of `state`; None: the position is
            computed from `state.step` and `updates_per_item`.
          max_steps: total updates after which to stop, at the end of the current item.
          eval_loader, eval_steps, max_eval_batches: validate every `eval_steps` updates (None: at
            the end of every epoch; 0: only at the end of the run) and at the end of the run.
          eval_on_start: validate before the first update too.
          checkpointer: has `save(step, state, progress)` and `wait()`, see `relax.checkpoint`. It
            saves at the end of the run and every `save_steps` updates (0: at the end of every
            epoch). All checkpoints are committed when `train` returns.

        Raises:
          ValueError: if neither or both of `key` and `state` are given, or the loader is empty.
        """
        state = _first_state(self, key, state)
        event = _first_event(self, state, train_loader, num_epochs, max_steps, progress)
        epoch, saved = event.epoch or 0, None if progress is None else event.step
        with Interrupt() as interrupt, contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.close)
            if checkpointer is not None:
                stack.callback(checkpointer.wait)
            interrupt.arm()
            validate = functools.partial(_validate_once, eval_loader, max_eval_batches, interrupt)

            def is_over(event: Event) -> bool:
                asked = interrupt.agree()
                enough = max_steps is not None and event.step >= max_steps
                return enough or event.stop or asked is not None

            event = hooks.call("on_train_begin", event)
            dropped = progress is not None and _dropped_evaluation(event, eval_steps)
            if dropped or (eval_on_start and event.step == 0):
                event = validate(event)
            while epoch < num_epochs and not is_over(event):
                if event.position == 0:
                    event = hooks.call("on_epoch_begin", event)
                for item in items_of(train_loader, epoch, event.position):
                    if is_over(event):
                        break
                    before, whole = event.step, event
                    event = replace(event, position=event.position + 1)
                    for given in interrupt.until_asked(self.make_batches(event.state, item)):
                        logged = given if isinstance(given, LoggedBatch) else LoggedBatch(given)
                        event = replace(event, batch=logged.batch, records=logged.records)
                        event = hooks.call("on_batch_begin", event)
                        batch = parallel.shard_batch(logged.batch)
                        state, metrics = self.train_step(event.state, batch)
                        metrics |= logged.metrics
                        event = replace(event, state=state, step=event.step + 1, metrics=metrics)
                        event = hooks.call("on_batch_end", event)
                    if event.step == before and interrupt.requested is not None:
                        event = whole  # the item is abandoned and repeated on resume
                        break
                    event = replace(event, batch=None, records=(), metrics={})
                    if is_due(eval_steps, before, event.step):
                        event = validate(event)
                    if is_due(save_steps, before, event.step):
                        event, saved = _save(checkpointer, event), event.step
                else:  # the loader has ended: the epoch is done
                    require_items(event.position, epoch)
                    event = hooks.call("on_epoch_end", event)
                    if eval_steps is None:
                        event = validate(event)
                    event, epoch = replace(event, epoch=epoch + 1, position=0), epoch + 1
                    if save_steps == 0:
                        event, saved = _save(checkpointer, event), event.step
            if interrupt.agree() is None:
                event = validate(event)
            if checkpointer is not None:
                event = event if saved == event.step else _save(checkpointer, event)
                checkpointer.wait()
            hooks.call("on_train_end", event)
        return event.state


def _first_state(trainer: Trainer, key, state) -> TrainState:
    if (state is None) == (key is None):
        got = "neither" if key is None else "both"
        raise ValueError(f"train needs a key, such as jax.random.key(0), or a state, got {got}.")
    return trainer.create_train_state(key) if state is None else state


def _first_event(trainer, state, loader, num_epochs, max_steps, progress) -> Event:
    """The first event of a run: at step 0, or at the position of `progress` or the state."""
    length = len(loader) if hasattr(loader, "__len__") else None
    step, updates = int(state.step), trainer.updates_per_item
    if progress is None:
        items = step // updates
        epoch, position = divmod(items, length) if length else (0, items)
        progress = {"epoch": epoch, "position": position}
    hooks.load_state_dicts(trainer.callbacks, progress.get("callbacks", {}))
    limits = [length * num_epochs * updates] if length else []
    limits += [] if max_steps is None else [max_steps]
    return Event(
        trainer,
        state,
        step,
        epoch=progress["epoch"],
        position=progress["position"],
        epoch_length=length,
        total_steps=min(limits, default=None),
        evaluated=progress.get("evaluated"),
    )


def _validate_once(loader, most: int | None, interrupt: Interrupt, event: Event) -> Event:
    """Validates, unless there is no loader or this step has been validated already."""
    if loader is None or event.evaluated == event.step:
        return event
    with contextlib.suppress(Interrupted):  # dropped: a resumed run validates
        done, _ = _validate(event, loader, most, interrupt.dropping())
        return replace(done, metrics={}, evaluated=event.step)
    return event


def _dropped_evaluation(event: Event, eval_steps: int | None) -> bool:
    """Whether an evaluation was due when a resumed run stopped, even if it was finished."""
    before = max(event.step - event.trainer.updates_per_item, 0)
    at_epoch_end = event.position == 0 and bool(event.epoch)
    return at_epoch_end if eval_steps is None else is_due(eval_steps, before, event.step)


def _validate(event: Event, loader, most: int | None, within=None) -> tuple[Event, Evaluation]:
    event = hooks.call("on_validation_begin", event)
    with within or contextlib.nullcontext():
        metrics = event.trainer._evaluate(event.state, loader, most)
        metrics |= hooks.evaluations(event)
    return hooks.call("on_validation_end", replace(event, metrics=metrics)), metrics


def _save(checkpointer, event: Event) -> Event:
    progress = {name: getattr(event, name) for name in ("epoch", "position", "evaluated")}
    progress["callbacks"] = hooks.state_dicts(event.trainer.callbacks)
    checkpointer.save(event.step, event.state, progress)
    return hooks.call("on_save", event)
