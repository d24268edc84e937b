"""Optimizers that wrap other optimizers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from relax.optimizers.host import select


class ByKeyState(NamedTuple):
    """State of `partition_by_key`.

    Attributes:
      parts: the optimizers' states, by key.
    """

    parts: dict[str, Any]


def partition_by_key(
    optimizers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One optimizer for each top-level key of the parameters.

    Args:
      optimizers: by key; parameters and gradients are dicts with these keys.

    Example:
      >>> optimizer = partition_by_key({"policy": optax.sgd(1.0), "value": optax.sgd(0.5)})
      >>> params = {"policy": jnp.ones(1), "value": jnp.ones(1)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["policy"].item(), updates["value"].item()
      (-1.0, -0.5)
    """

    def init(params):
        parts = {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}
        return ByKeyState(parts)

    def update(updates, state, params):
        both = {
            name: optimizer.update(updates[name], state.parts[name], params[name])
            for name, optimizer in optimizers.items()
        }
        moves, parts = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
        return moves, ByKeyState(parts)

    return optax.GradientTransformation(init, update)


class DelayedState(NamedTuple):
    """State of `freeze_for`.

    Attributes:
      inner: the wrapped optimizer's state.
      waited: int32 scalar, skipped updates so far.
    """

    inner: Any
    waited: jax.Array


def freeze_for(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Leaves parameters and the optimizer's state unchanged for the first `steps` updates."""
    if not steps:
        return optimizer

    def init(params):
        return DelayedState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        waits = state.waited < steps
        # NaN leaves a state on the host as it is.
        updates = jax.tree.map(lambda update: jnp.where(waits, jnp.nan, update), updates)
        moves, inner = optimizer.update(updates, state.inner, params)
        moves = jax.tree.map(lambda move: jnp.where(waits, 0, move), moves)
        inner = select(~waits, inner, state.inner)
        return moves, DelayedState(inner, state.waited + waits)

    return optax.GradientTransformation(init, update)
