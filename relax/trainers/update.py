"""The parts of one optimizer update, as pure functions: accumulate, clip, apply.

A loss function here is `f(params, micro_batch, index) -> LossOutput`, index the micro-batch's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from relax import parallel

IGNORED_WEIGHT = 1e-30  # keeps 0 / 0 at 0 where nothing at all is trained


class Mean(NamedTuple):
    """A metric that is a mean over other items than the loss: its value and how many they are."""

    value: jax.Array
    weight: jax.Array


class Sum(NamedTuple):
    """A metric that is a count: micro-batches and batches add up."""

    value: jax.Array


class Max(NamedTuple):
    """A metric of which the largest value over micro-batches and batches counts."""

    value: jax.Array


class Min(NamedTuple):
    """A metric of which the smallest value counts."""

    value: jax.Array


@flax.struct.dataclass
class LossOutput:
    """What a loss returns.

    Attributes:
      loss: scalar, a mean.
      weight: scalar, how many items (tokens, sequences) it is the mean of.
      metrics: flat dict of scalars, means over the same items, or `Mean`, `Sum`, `Max`, `Min`.
    """

    loss: jax.Array
    weight: jax.Array | float = 1.0
    metrics: dict[str, Any] = flax.struct.field(default_factory=dict)


def as_loss_output(loss) -> LossOutput:
    """A bare scalar counts as the mean of one item."""
    if isinstance(loss, LossOutput):
        output = loss
    else:
        output = LossOutput(loss=loss)
    weight = jax.lax.stop_gradient(jnp.asarray(output.weight, jnp.float32))
    return replace(output, loss=jnp.asarray(output.loss), weight=weight)


def split_micro_batches(batch, count: int):
    """Every leaf `[count * B, ...]` -> `[count, B, ...]`."""

    def split(leaf):
        if leaf.shape[0] % count:
            raise ValueError(
                f"gradient_accumulation_steps must divide the rows of a batch, got {count} steps "
                f"and {leaf.shape[0]} rows. Use a batch size that is a multiple of {count}."
            )
        split = leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])
        # Rows of a micro-batch lie together, and are to be shared out among all devices.
        return parallel.constrain(split, None, "batch", *(None,) * (leaf.ndim - 1))

    return jax.tree.map(split, batch)


def accumulate_gradients(loss_fn: Callable, params, batch, count: int):
    """The gradient of the mean loss over all items of a batch, micro-batch by micro-batch.

        g = Σᵢ wᵢ gᵢ / Σᵢ wᵢ

    so that 1 x 8 and 8 x 1 micro-batches give the same update, however unequal their weights.

    Args:
      loss_fn: see the head of this file.
      params: what the gradient is with respect to.
      batch: tree of arrays with a leading axis that `count` divides.
      count: micro-batches (>= 1).

    Returns:
      `(gradients, metrics)`: metrics hold `loss` and the loss function's own, reduced.
    """

    def weighted_loss(params, micro_batch, index):
        output = as_loss_output(loss_fn(params, micro_batch, index))
        return output.loss * output.weight, output

    def differentiate(micro_batch, index):
        weighted = jax.value_and_grad(weighted_loss, has_aux=True)
        (_, output), gradients = weighted(params, micro_batch, index)
        # A mean of no items is 0 / 0 in many a loss: 0 * NaN must not reach the sum.
        gradients = jax.tree.map(lambda g: jnp.where(output.weight > 0, g, 0), gradients)
        return gradients, output

    if count == 1:
        gradients, output = differentiate(batch, 0)
        outputs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], output)
    else:

        def body(total, slice_and_index):
            gradients, output = differentiate(*slice_and_index)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients)
            return parallel.constrain_tree(total), output

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        xs = (split_micro_batches(batch, count), jnp.arange(count))
        gradients, outputs = jax.lax.scan(body, zeros, xs)
    scale = 1.0 / jnp.maximum(outputs.weight.sum(), IGNORED_WEIGHT)
    gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)
    return gradients, reduce_metrics(outputs)


def reduce_metrics(outputs: LossOutput) -> dict[str, jax.Array]:
    """Stacked outputs `[n]` -> one scalar per metric: weighted means, sums of counts, extremes."""

    def mean(value, weight):
        # A micro-batch of no weight has no say, whatever its value.
        products = jnp.where(weight > 0, value * weight, 0.0)
        return products.sum() / jnp.maximum(weight.sum(), IGNORED_WEIGHT)

    metrics = {"loss": mean(outputs.loss, outputs.weight)}
    for name, metric in outputs.metrics.items():
        if isinstance(metric, Sum):
            metrics[name] = metric.value.sum()
        elif isinstance(metric, Max):
            metrics[name] = metric.value.max()
        elif isinstance(metric, Min):
            metrics[name] = metric.value.min()
        elif isinstance(metric, Mean):
            metrics[name] = mean(metric.value, metric.weight)
        else:
            metrics[name] = mean(metric, outputs.weight)
    return metrics


def apply_gradients(optimizer, gradients, params, opt_state, finite, scale):
    """One optimizer step on `gradients * scale`; where not `finite`, bit for bit none at all."""
    gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    updates, new_opt_state = optimizer.update(gradients, opt_state, params)
    new_params = optax.apply_updates(params, updates)

    def keep(new, old):
        return jnp.where(finite, new, old)

    return jax.tree.map(keep, new_params, params), jax.tree.map(keep, new_opt_state, opt_state)


def clip_scale(grad_norm, max_grad_norm: float | None):
    """min(1, max_grad_norm / ‖g‖): what gradients are multiplied with (Pascanu et al., 2013)."""
    if not max_grad_norm:
        return jnp.ones_like(grad_norm)
    return jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6))
