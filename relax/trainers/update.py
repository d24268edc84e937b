"""The parts of one optimizer update, as pure functions: accumulate, clip, apply.

A loss function is `f(params, micro_batch, index) -> LossOutput`; `index` counts micro-batches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from relax import parallel
from relax.optimizers import select

IGNORED_WEIGHT = 1e-30  # makes 0 / 0 zero when a batch has no trained item


class Mean(NamedTuple):
    """A metric averaged over other items than the loss: the mean and its number of items."""

    value: jax.Array
    weight: jax.Array


class Sum(NamedTuple):
    """A count, summed over micro-batches and batches."""

    value: jax.Array


class Max(NamedTuple):
    """A metric reduced to its maximum over micro-batches and batches."""

    value: jax.Array


class Min(NamedTuple):
    """A metric reduced to its minimum over micro-batches and batches."""

    value: jax.Array


@flax.struct.dataclass
class LossOutput:
    """The result of a loss function.

    Attributes:
      loss: scalar, a mean over items.
      weight: scalar, the number of those items (tokens or sequences).
      metrics: flat dict of scalars, means over the same items, or `Mean`, `Sum`, `Max`, `Min`.
    """

    loss: jax.Array
    weight: jax.Array | float = 1.0
    metrics: dict[str, Any] = flax.struct.field(default_factory=dict)


def as_loss_output(loss) -> LossOutput:
    """`loss` as a `LossOutput`; a bare scalar counts as the mean of one item."""
    output = loss if isinstance(loss, LossOutput) else LossOutput(loss=loss)
    weight = jax.lax.stop_gradient(jnp.asarray(output.weight, jnp.float32))
    return replace(output, loss=jnp.asarray(output.loss), weight=weight)


def split_micro_batches(batch, count: int):
    """Reshapes every leaf from `[count * B, ...]` to `[count, B, ...]`."""

    def split(leaf):
        if leaf.shape[0] % count:
            raise ValueError(
                f"gradient_accumulation_steps must divide the rows of a batch, got {count} steps "
                f"and {leaf.shape[0]} rows. Use a batch size that is a multiple of {count}."
            )
        split = leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])
        # The rows of a micro-batch are contiguous; constrain them to spread over all devices.
        return parallel.constrain(split, None, "batch", *(None,) * (leaf.ndim - 1))

    return jax.tree.map(split, batch)


def accumulate_gradients(loss_fn: Callable, params, batch, count: int):
    """The gradient of the mean loss over all items of a batch, micro-batch by micro-batch.

        g = Σᵢ wᵢ gᵢ / Σᵢ wᵢ

    so that 1 x 8 and 8 x 1 micro-batches give the same update, however unequal their weights.

    Args:
      loss_fn: see the module docstring.
      params: differentiated with respect to these.
      batch: tree of arrays with a leading axis that `count` divides.
      count: micro-batches (>= 1).

    Returns:
      `(gradients, metrics)`: metrics hold `loss` and those of the loss function, reduced.
    """

    def weighted_loss(params, micro_batch, index):
        output = as_loss_output(loss_fn(params, micro_batch, index))
        return output.loss * output.weight, output

    def differentiate(micro_batch, index):
        weighted = jax.value_and_grad(weighted_loss, has_aux=True)
        (_, output), gradients = weighted(params, micro_batch, index)
        # The mean of no items is 0 / 0 in many losses: 0 * NaN must not reach the sum.
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
    """Reduces stacked outputs `[n]` to a scalar per metric: weighted means, sums, extremes."""

    def mean(value, weight):
        # A micro-batch of weight 0 is ignored even if its value is NaN.
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
    """Takes one optimizer step on `gradients * scale`; if not `finite`, returns the old values."""
    scale = jnp.where(finite, scale, jnp.nan)  # which leaves a state on the host as it is
    gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    updates, new_opt_state = optimizer.update(gradients, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    return select(finite, new_params, params), select(finite, new_opt_state, opt_state)


def clip_scale(grad_norm, max_grad_norm: float | None):
    """Clipping factor of the gradients, min(1, max_grad_norm / ‖g‖) (Pascanu et al., 2013)."""
    if not max_grad_norm:
        return jnp.ones_like(grad_norm)
    return jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6))
