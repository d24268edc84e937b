"""Chunks of tokens whose logits exist at once, for cross-entropy and log-probabilities.

Axes: M tokens, n chunks of C tokens, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

IGNORED = -100  # label without a target: prompts, padding, the first token of a document


def check_shapes(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> None:
    """Refuses shapes other than `[M, D]`, `[V, D]` and `[M]`.

    Raises:
      ValueError: a shape is wrong; names all three.
    """
    shapes = hidden.shape, matrix.shape, targets.shape
    if [len(shape) for shape in shapes] != [2, 2, 1] or (
        (hidden.shape[0], matrix.shape[1]) != (targets.shape[0], hidden.shape[1])
    ):
        raise ValueError(
            "hidden, matrix and targets must be [M, D], [V, D] and [M], got "
            f"{', '.join(map(str, shapes))}. Flatten rows of tokens first."
        )


def trained_first(hidden: jax.Array, targets: jax.Array):
    """Sorts tokens so that those with a target come first; also returns the order.

    States `[M, D]` of ignored tokens become 0: a NaN times a zero gradient would still reach the
    output matrix.
    """
    order = jnp.argsort(targets == IGNORED, stable=True)
    hidden = jnp.where((targets != IGNORED)[:, None], hidden, 0)
    # Declared unique, so that its gradient, a scatter, need not add.
    hidden = hidden.at[order].get(unique_indices=True, mode="promise_in_bounds")
    return hidden, targets[order], order


def split(x: jax.Array, chunk_size: int, fill: float = 0) -> jax.Array:
    """`[M, ...]` -> `[n, C, ...]`, padded at the end."""
    pad = [(0, -x.shape[0] % chunk_size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad, constant_values=fill).reshape(-1, chunk_size, *x.shape[1:])


def joined(chunks: jax.Array, count: int) -> jax.Array:
    """`[n, C, ...]` -> `[M, ...]`, M = `count`."""
    return chunks.reshape(-1, *chunks.shape[2:])[:count]


def has_target(targets: jax.Array) -> jax.Array:
    """Whether a chunk holds any target; those without, at the end, are skipped."""
    return (targets != IGNORED).any()


def is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`[C, V]` bool, true at each row's target."""
    return jnp.arange(logits.shape[-1])[None, :] == targets[:, None]


def logits_and_slope(
    hidden: jax.Array, matrix: jax.Array, softcap: float | None, temperature: float = 1.0
):
    """Logits z `[C, V]` in float32, and their slope ∂z / ∂(hidden · matrixᵀ).

    z = c tanh(hidden · matrixᵀ / c) / temperature; without a cap c, hidden · matrixᵀ / temperature.
    """
    logits = jnp.einsum("CD,VD->CV", hidden, matrix, preferred_element_type=jnp.float32)
    if softcap is None:
        return logits / temperature, 1.0 / temperature
    share = jnp.tanh(logits / softcap)
    return softcap * share / temperature, (1.0 - jnp.square(share)) / temperature


def backward(d_logits: jax.Array, hidden: jax.Array, matrix: jax.Array, d_matrix):
    """Cotangents of `hidden`, and `d_matrix` plus those of `matrix`, from those of the product.

    `d_matrix` is float32, or None if the matrix is not trained; its product is then not computed.
    """
    d_hidden = jnp.einsum("CV,VD->CD", d_logits, matrix, preferred_element_type=jnp.float32)
    if d_matrix is not None:
        d_matrix += jnp.einsum("CV,CD->VD", d_logits, hidden, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_matrix
