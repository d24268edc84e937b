"""Gradient checkpointing that also saves memory on CPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel
from relax.models.attention import SAVED


def _matmul(prim, *_, **params):
    if prim.name == "ragged_dot_general":  # of experts
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *_, **params)


def _attention(prim, *_, **params):
    if prim.name == "dot_product_attention_fwd_wrapper":  # cuDNN's
        return True
    return jax.checkpoint_policies.save_only_these_names(SAVED)(prim, *_, **params)


# What a layer keeps for the backward pass; all else it computes again, from its input.
POLICIES = {
    # No matrix product is done twice: norms, rotations, gates and products of gates are.
    "matmuls": jax.checkpoint_policies.save_from_both_policies(_matmul, _attention),
    "attention": _attention,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def checkpointed(f, policy=None):
    """`jax.checkpoint(f, policy=policy)` whose backward pass runs on its own, at its own time.

    XLA's CPU compiler drops the barriers of `jax.checkpoint` before it orders the instructions. It
    then recomputes all layers before the first backward pass, and the memory is as if nothing had
    been checkpointed. A conditional is an order that it keeps: here the backward pass of each layer
    is the branch of a condition that always holds, which the compiler cannot know.

    Args:
      f: `f(params, x, constants) -> (y, others)`, arrays; the constants get no gradient, and
        neither do those leaves of `params` that nothing is differentiated with respect to.
      policy: see `jax.checkpoint_policies`; None recomputes everything.
    """
    f = jax.checkpoint(f, policy=policy)
    if parallel.platform() != "cpu":
        return f

    def forward(params, x, constants):
        # Frozen leaves would otherwise have a gradient, which a conditional always computes.
        trained = jax.tree.map(lambda leaf: leaf.perturbed, params)
        values, x, constants = jax.tree.map(lambda leaf: leaf.value, (params, x, constants))
        ours = jax.tree.map(lambda leaf, keep: leaf if keep else None, values, trained)

        def run(ours, x):
            merged = jax.tree.map(
                lambda leaf, own: leaf if own is None else own,
                values,
                ours,
                is_leaf=lambda leaf: leaf is None,
            )
            return f(merged, x, constants)

        out, vjp = jax.vjp(run, ours, x)
        return out, vjp

    def backward(vjp, cotangents):
        cotangents = jax.tree.map(
            _materialised, cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero)
        )
        always = jnp.logical_not(cotangents[0].ravel()[0] > jnp.inf)  # of NaN as well
        shapes = jax.eval_shape(vjp, cotangents)

        def never(_):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return *jax.lax.cond(always, vjp, never, cotangents), None

    run = jax.custom_vjp(f)
    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _materialised(leaf):
    if not isinstance(leaf, SymbolicZero):
        return leaf
    aval: Any = leaf.aval
    return jnp.zeros(aval.shape, aval.dtype)
