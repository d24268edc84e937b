"""Next-token cross-entropy from hidden states, without ever holding the logits of a whole batch.

Axes: B batch, T tokens of a row, M = B * T tokens in all, C tokens of a chunk, D model,
V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

IGNORED = -100  # a label that is no target: prompts, padding, the first token of a document


class TokenSums(NamedTuple):
    """Sums over the trained tokens, float32 scalars. Only `nll` carries a gradient."""

    nll: jax.Array  # Σ −log p(target), nats
    correct: jax.Array  # Σ 1[argmax p = target]
    entropy: jax.Array  # Σ H(p), nats
    weight: jax.Array  # how many tokens are trained


def next_token_targets(labels: jax.Array) -> jax.Array:
    """Labels in Hugging Face alignment -> the target of each position; the last one has none.

    Args:
      labels: `[B, T]` int, the token itself where it is trained, `IGNORED` elsewhere.

    Returns:
      `[B, T]`: entry t is label t + 1.

    Example:
      >>> next_token_targets(jnp.array([[-100, 5, 6]])).tolist()
      [[5, 6, -100]]
    """
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


def linear_cross_entropy(
    hidden: jax.Array, matrix: jax.Array, targets: jax.Array, *, chunk_size: int = 256
) -> TokenSums:
    """Cross-entropy of `softmax(hidden @ matrixᵀ)` against `targets`, summed over trained tokens.

        Σ_m 1[target_m ≠ IGNORED] · (logsumexp_v z_mv − z_m,target_m),   z = hidden · matrixᵀ

    Works through `chunk_size` tokens at a time, trained tokens first, and skips the chunks that
    hold none: a batch of long prompts and short answers pays for its answers only. The gradient
    is made in the same pass as the loss, so no logits are computed twice.

    Args:
      hidden: `[M, D]` the model's last hidden states. Rows of ignored tokens may hold anything.
      matrix: `[V, D]` the output matrix.
      targets: `[M]` int in [0, V) or `IGNORED`.
      chunk_size: tokens whose logits exist at once.

    Returns:
      The sums over the trained tokens. With none, all are exactly 0 and so are the gradients.
    """
    return TokenSums(*_sums(hidden, matrix, targets, min(chunk_size, hidden.shape[0])))


def target_hits(
    hidden: jax.Array, matrix: jax.Array, targets: jax.Array, *, chunk_size: int = 256
) -> jax.Array:
    """`[M]` bool: whether the most likely token is the target; shapes as `linear_cross_entropy`."""

    def hits(row):
        logits = jnp.einsum("D,VD->V", row[0], matrix, preferred_element_type=jnp.float32)
        return logits.argmax() == row[1]

    return jax.lax.map(hits, (hidden, targets), batch_size=chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sums(hidden, matrix, targets, chunk_size):
    chunks = _chunks(hidden, targets, chunk_size)
    body = functools.partial(_accumulate, matrix)
    return jax.lax.scan(body, _zeros(), chunks)[0]


def _sums_forward(hidden, matrix, targets, chunk_size):
    """Also gives ∂nll/∂hidden and ∂nll/∂matrix, which the backward pass only scales."""
    order = _trained_first(targets)
    chunks = _chunks(hidden, targets, chunk_size)

    def body(carry, chunk):
        sums, d_matrix = carry

        def trained(sums, d_matrix):
            sums, d_logits = _chunk_sums(matrix, sums, chunk)
            d_hidden = jnp.einsum("CV,VD->CD", d_logits, matrix, preferred_element_type=jnp.float32)
            d_matrix += jnp.einsum(
                "CV,CD->VD", d_logits, chunk[0], preferred_element_type=jnp.float32
            )
            return (sums, d_matrix), d_hidden.astype(hidden.dtype)

        def skipped(sums, d_matrix):
            return (sums, d_matrix), jnp.zeros_like(chunk[0])

        return jax.lax.cond((chunk[1] != IGNORED).any(), trained, skipped, sums, d_matrix)

    start = (_zeros(), jnp.zeros(matrix.shape, jnp.float32))
    (sums, d_matrix), d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    d_hidden = jnp.zeros_like(hidden).at[order].set(d_hidden, unique_indices=True)
    return sums, (d_hidden, d_matrix.astype(matrix.dtype))


def _sums_backward(chunk_size, residuals, cotangents):
    d_hidden, d_matrix = residuals
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_matrix * scale.astype(d_matrix.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def _zeros():
    return tuple(jnp.zeros((), jnp.float32) for _ in TokenSums._fields)


def _trained_first(targets):
    return jnp.argsort(targets == IGNORED, stable=True)


def _chunks(hidden, targets, chunk_size):
    """Tokens in the order trained, ignored, cut into `[n, C, D]` and `[n, C]`."""
    order = _trained_first(targets)
    pad = -hidden.shape[0] % chunk_size
    targets = jnp.pad(targets[order], (0, pad), constant_values=IGNORED)
    hidden = jnp.pad(hidden[order], ((0, pad), (0, 0)))
    # An ignored row may hold NaN, which times a zero gradient would still reach the matrix.
    hidden = jnp.where((targets != IGNORED)[:, None], hidden, 0)
    return hidden.reshape(-1, chunk_size, hidden.shape[1]), targets.reshape(-1, chunk_size)


def _accumulate(matrix, sums, chunk):
    trained = (chunk[1] != IGNORED).any()
    return jax.lax.cond(
        trained, lambda s: _chunk_sums(matrix, s, chunk)[0], lambda s: s, sums
    ), None


def _chunk_sums(matrix, sums, chunk):
    """Adds one chunk to the sums; also gives ∂nll/∂logits `[C, V]` in the matrix's dtype."""
    hidden, targets = chunk
    trained = targets != IGNORED
    logits = jnp.einsum("CD,VD->CV", hidden, matrix, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    exp = jnp.exp(shifted)
    total = exp.sum(axis=-1, keepdims=True)
    is_target = jnp.arange(logits.shape[-1])[None, :] == targets[:, None]
    target_shifted = jnp.where(is_target, shifted, 0).sum(axis=-1)
    log_total = jnp.log(total[:, 0])
    entropy = log_total - (exp * shifted).sum(axis=-1) / total[:, 0]
    correct = logits.argmax(axis=-1) == targets
    parts = (log_total - target_shifted, correct, entropy, jnp.ones_like(entropy))
    sums = tuple(s + jnp.where(trained, p, 0).sum() for s, p in zip(sums, parts, strict=True))
    d_logits = jnp.where(trained[:, None], exp / total - is_target, 0)
    return sums, d_logits.astype(matrix.dtype)
