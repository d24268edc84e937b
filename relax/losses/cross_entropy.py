"""Next-token cross-entropy from hidden states, without ever holding the logits of a whole batch.

Axes: B batch, T tokens of a row, M = B * T tokens in all, C tokens of a chunk, D model,
V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel

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
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    chunk_size: int = 256,
    softcap: float | None = None,
) -> TokenSums:
    """Cross-entropy of `softmax(hidden @ matrixᵀ)` against `targets`, summed over trained tokens.

        Σ_m 1[target_m ≠ IGNORED] · (logsumexp_v z_mv − z_m,target_m),   z = cap(hidden · matrixᵀ)

    Works through `chunk_size` tokens at a time, trained tokens first, and skips the chunks that
    hold none: a batch of long prompts and short answers pays for its answers only. The gradient
    is made in the same pass as the loss, so no logits are computed twice, and the one of a matrix
    that nothing is differentiated with respect to is not made. Products are of the hidden states'
    dtype and summed in float32, as is all that comes after them.

    Args:
      hidden: `[M, D]` the model's last hidden states. Rows of ignored tokens may hold anything.
      matrix: `[V, D]` the output matrix.
      targets: `[M]` int in [0, V) or `IGNORED`.
      chunk_size: tokens whose logits exist at once (>= 1).
      softcap: c in cap(z) = c tanh(z / c); None: no cap.

    Returns:
      The sums over the trained tokens. With none, all are exactly 0 and so are the gradients.

    Raises:
      ValueError: there is no token, or `chunk_size` is below 1.
    """

    def sums(hidden, matrix, targets):
        parts = _sums(hidden, matrix, targets, _checked(hidden, chunk_size), softcap)
        return tuple(part[None] for part in parts)

    _checked(hidden, chunk_size)
    # Each device goes through the chunks of its own tokens.
    run = parallel.per_device(sums, (("batch",), None, ("batch",)), (("batch",),) * 4, auto=True)
    return TokenSums(*(part.sum() for part in run(hidden, matrix, targets)))


def target_hits(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    chunk_size: int = 256,
    softcap: float | None = None,
) -> jax.Array:
    """`[M]` bool: whether the most likely token is the target; see `linear_cross_entropy`."""

    def hits(hidden, matrix, targets):
        matrix = matrix.astype(hidden.dtype)

        def hit(row):
            logits = jnp.einsum("D,VD->V", row[0], matrix, preferred_element_type=jnp.float32)
            return _capped(logits, softcap)[0].argmax() == row[1]

        return jax.lax.map(hit, (hidden, targets), batch_size=_checked(hidden, chunk_size))

    run = parallel.per_device(hits, (("batch",), None, ("batch",)), ("batch",), auto=True)
    return run(hidden, matrix, targets)


def _checked(hidden, chunk_size):
    if chunk_size < 1 or not hidden.shape[0]:
        raise ValueError(
            "cross-entropy needs at least one token and chunks of at least one, got "
            f"{hidden.shape[0]} tokens and chunk_size={chunk_size}. Leave chunk_size at 256."
        )
    return min(chunk_size, hidden.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sums(hidden, matrix, targets, chunk_size, softcap):
    chunks = _chunks(hidden, targets, chunk_size)
    body = functools.partial(_accumulate, matrix.astype(hidden.dtype), softcap)
    return jax.lax.scan(body, _zeros(), chunks)[0]


def _sums_forward(hidden, matrix, targets, chunk_size, softcap):
    """Also gives ∂nll/∂hidden and ∂nll/∂matrix, which the backward pass only scales."""
    hidden, targets = hidden.value, targets.value
    matrix, is_trained = matrix.value, matrix.perturbed
    narrow = matrix.astype(hidden.dtype)
    order = _trained_first(targets)
    chunks = _chunks(hidden, targets, chunk_size)

    def body(carry, chunk):
        sums, d_matrix = carry

        def trained(sums, d_matrix):
            sums, d_logits = _chunk_sums(narrow, softcap, sums, chunk)
            d_hidden = jnp.einsum("CV,VD->CD", d_logits, narrow, preferred_element_type=jnp.float32)
            if is_trained:
                d_matrix += jnp.einsum(
                    "CV,CD->VD", d_logits, chunk[0], preferred_element_type=jnp.float32
                )
            return (sums, d_matrix), d_hidden.astype(hidden.dtype)

        def skipped(sums, d_matrix):
            return (sums, d_matrix), jnp.zeros_like(chunk[0])

        return jax.lax.cond((chunk[1] != IGNORED).any(), trained, skipped, sums, d_matrix)

    start = (_zeros(), jnp.zeros(matrix.shape, jnp.float32) if is_trained else None)
    (sums, d_matrix), d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    d_hidden = jnp.zeros_like(hidden).at[order].set(d_hidden, unique_indices=True)
    return sums, (d_hidden, d_matrix.astype(matrix.dtype) if is_trained else None)


def _sums_backward(chunk_size, softcap, residuals, cotangents):
    d_hidden, d_matrix = residuals
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # some other sum is differentiated: those are constants
        return None, None, None
    if d_matrix is not None:
        d_matrix *= scale.astype(d_matrix.dtype)
    return d_hidden * scale.astype(d_hidden.dtype), d_matrix, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


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


def _accumulate(matrix, softcap, sums, chunk):
    trained = (chunk[1] != IGNORED).any()
    return jax.lax.cond(
        trained, lambda s: _chunk_sums(matrix, softcap, s, chunk)[0], lambda s: s, sums
    ), None


def _capped(logits, softcap):
    """c tanh(logits / c), and its slope."""
    if softcap is None:
        return logits, None
    share = jnp.tanh(logits / softcap)
    return softcap * share, 1.0 - jnp.square(share)


def _chunk_sums(matrix, softcap, sums, chunk):
    """Adds one chunk to the sums; also gives ∂nll/∂(hidden · matrixᵀ) `[C, V]`, narrow."""
    hidden, targets = chunk
    trained = targets != IGNORED
    logits = jnp.einsum("CD,VD->CV", hidden, matrix, preferred_element_type=jnp.float32)
    logits, slope = _capped(logits, softcap)
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
    d_logits = exp / total - is_target
    d_logits = d_logits if slope is None else d_logits * slope
    d_logits = jnp.where(trained[:, None], d_logits, 0)
    return sums, d_logits.astype(matrix.dtype)
