"""Optimizer state in the host's memory, which visits the device part by part."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MEMORY_KIND = "pinned_host"  # jax's name for the host's memory that a device reads by itself
LEAST_SIZE = 4096  # smaller arrays stay on the device: a transfer would cost more than they do
_FIELD = "on_host"


class OnHostState(NamedTuple):
    """State of `offload`.

    Attributes:
      on_host: the optimizer's state of each part of the parameters, by top-level key.
    """

    on_host: dict[str, Any]


def lies_on_host(path: str, shape) -> bool:
    """Whether the leaf of a state at `path`, such as `opt_state/on_host/a/mu/a`, is on the host."""
    return _FIELD in path.split("/") and _is_large(shape)


def _is_large(shape) -> bool:
    return math.prod(shape) >= LEAST_SIZE


def is_on_host(node) -> bool:
    """Whether a node of an optimizer's state is one of `offload`."""
    return isinstance(node, OnHostState)


def offload(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state of an optimizer in the host's memory.

    Each top-level key of the parameters, such as a layer, has a state of its own. It is copied to
    the device, updated and copied back before the next one, so that the device never holds all of
    them. To that end each is the branch of a condition: compilers start copies as early as they
    can, but not before a branch is taken.

    A part whose gradient begins with a NaN or an infinity is left as it is, with updates of 0:
    outside of the branch there is no old state to choose instead of the new one.

    Args:
      optimizer: one that treats every array by itself, as those of `relax.optimizers` do.
    """

    def init(params):
        states = {name: optimizer.init({name: part}) for name, part in _parts(params).items()}
        return OnHostState(_moved(states, jax.memory.Space.Host))

    def update(updates, state, params):
        gradients, params = _parts(updates), _parts(params)
        results = {
            name: _update(optimizer, {name: gradients[name]}, old, {name: params[name]})
            for name, old in state.on_host.items()
        }
        moves = {name: move[name] for name, (move, _) in results.items()}
        moves = moves if isinstance(updates, Mapping) else moves[""]
        return moves, OnHostState({name: new for name, (_, new) in results.items()})

    return optax.GradientTransformation(init, update)


def _parts(tree) -> dict[str, Any]:
    return dict(tree) if isinstance(tree, Mapping) else {"": tree}


def _update(optimizer, gradients, state, params):
    leaves = jax.tree.leaves(gradients)
    if not leaves:
        return optimizer.update(gradients, state, params)

    def proceed(gradients, state, params):
        moves, new = optimizer.update(gradients, to_device(state), params)
        return moves, _moved(new, jax.memory.Space.Host)

    def skip(gradients, state, params):
        shapes = jax.eval_shape(proceed, gradients, state, params)[0]
        return jax.tree.map(lambda move: jnp.zeros(move.shape, move.dtype), shapes), state

    is_finite = jnp.isfinite(leaves[0].ravel()[:1]).all()
    return jax.lax.cond(is_finite, proceed, skip, gradients, state, params)


def to_device(tree):
    """Copies the arrays of a part of a state to the device."""
    return _moved(tree, jax.memory.Space.Device)


def _moved(tree, space):
    def move(leaf):
        return jax.device_put(leaf, space) if _is_large(jnp.shape(leaf)) else leaf

    return jax.tree.map(move, tree)


def select(condition, new, old):
    """`new` where a scalar condition holds, else `old`; of states on the host always `new`."""

    def choose(new, old):
        return new if is_on_host(new) else jnp.where(condition, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_on_host)
