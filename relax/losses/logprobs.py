"""Log-probabilities of given tokens from hidden states, a chunk of tokens at a time.

The sampler and the trainers take theirs from the same logits: `token_logits` is the one place where
hidden states become logits at a temperature.

Axes: M tokens, C tokens of a chunk, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel
from relax.losses.cross_entropy import IGNORED


class TokenLogprobs(NamedTuple):
    """Per token, float32 nats; 0 where the target is `IGNORED`."""

    logprobs: jax.Array  # [M] log p(target)
    entropy: jax.Array  # [M] of the distribution that the target was drawn from


def token_logits(
    hidden: jax.Array,
    matrix: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """cap(hidden · matrixᵀ) / temperature, `[M, D]` and `[V, D]` -> `[M, V]` float32."""
    return _logits(hidden, matrix.astype(hidden.dtype), temperature, softcap)[0]


def linear_logprobs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 256,
) -> TokenLogprobs:
    """log softmax(z)[target] and the entropy of softmax(z).

        z = cap(hidden · matrixᵀ) / temperature

    Works through `chunk_size` tokens at a time, real ones first, and skips the chunks that hold
    none. The backward pass computes the logits of a chunk again; no more than one chunk's exist at
    a time. Products are of the hidden states' dtype and summed in float32.

    Args:
      hidden: `[M, D]` the states before the targets. Rows of ignored targets may hold anything.
      matrix: `[V, D]` the output matrix.
      targets: `[M]` int in [0, V) or `IGNORED`.
      temperature: above 0.
      softcap: c in cap(z) = c tanh(z / c); None: no cap.
      chunk_size: tokens whose logits exist at once (>= 1).

    Raises:
      ValueError: there is no token, or `chunk_size` or `temperature` is not above 0.
    """
    if chunk_size < 1 or temperature <= 0 or not hidden.shape[0]:
        raise ValueError(
            "log-probabilities need at least one token, a chunk_size of at least 1 and a "
            f"temperature above 0, got {hidden.shape[0]} tokens, {chunk_size} and {temperature}."
        )

    def of_part(hidden, matrix, targets):
        chunk = min(chunk_size, hidden.shape[0])
        order = jnp.argsort(targets == IGNORED, stable=True)
        real = (targets != IGNORED)[:, None]
        # An ignored row may hold NaN, which times a zero gradient would still reach the matrix.
        ordered = jnp.where(real, hidden, 0)[order]
        out = _ordered(ordered, matrix, targets[order], temperature, softcap, chunk)
        return tuple(jnp.zeros_like(x).at[order].set(x, unique_indices=True) for x in out)

    # Each device goes through the chunks of its own tokens.
    run = parallel.per_device(of_part, (("batch",), None, ("batch",)), (("batch",),) * 2, auto=True)
    return TokenLogprobs(*run(hidden, matrix, jnp.asarray(targets)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _ordered(hidden, matrix, targets, temperature, softcap, chunk_size):
    narrow = matrix.astype(hidden.dtype)

    def body(_, chunk):
        hidden, targets = chunk

        def real():
            logits, _ = _logits(hidden, narrow, temperature, softcap)
            logprobs, probs, entropy = _statistics(logits)
            chosen = jnp.where(_is_target(logits, targets), logprobs, 0).sum(axis=-1)
            return jnp.where(targets == IGNORED, 0, jnp.stack([chosen, entropy]))

        none = jnp.zeros((2, chunk_size), jnp.float32)
        return None, jax.lax.cond((targets != IGNORED).any(), real, lambda: none)

    chunks = (_chunked(hidden, chunk_size), _chunked(targets, chunk_size, IGNORED))
    _, out = jax.lax.scan(body, None, chunks)  # [n, 2, C]
    logprobs, entropy = out.swapaxes(0, 1).reshape(2, -1)[:, : hidden.shape[0]]
    return logprobs, entropy


def _ordered_forward(hidden, matrix, targets, temperature, softcap, chunk_size):
    arguments = (hidden.value, matrix.value, targets.value)
    out = _ordered(*arguments, temperature, softcap, chunk_size)
    return out, (*arguments, matrix.perturbed)


def _ordered_backward(temperature, softcap, chunk_size, residuals, cotangents):
    hidden, matrix, targets, is_trained = residuals
    d_logprobs, d_entropy = cotangents
    narrow = matrix.astype(hidden.dtype)
    with_entropy = not isinstance(d_entropy, SymbolicZero)
    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    d_logprobs = zeros if isinstance(d_logprobs, SymbolicZero) else d_logprobs
    d_entropy = d_entropy if with_entropy else zeros

    def body(d_matrix, chunk):
        hidden, targets, d_logprobs, d_entropy = chunk

        def real(d_matrix):
            logits, slope = _logits(hidden, narrow, temperature, softcap)
            logprobs, probs, entropy = _statistics(logits)
            d_logits = d_logprobs[:, None] * (_is_target(logits, targets) - probs)
            if with_entropy:
                d_logits -= d_entropy[:, None] * probs * (logprobs + entropy[:, None])
            d_logits = jnp.where((targets != IGNORED)[:, None], d_logits * slope, 0)
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden = jnp.einsum("CV,VD->CD", d_logits, narrow, preferred_element_type=jnp.float32)
            if is_trained:
                d_matrix += jnp.einsum(
                    "CV,CD->VD", d_logits, hidden, preferred_element_type=jnp.float32
                )
            return d_matrix, d_hidden.astype(hidden.dtype)

        def none(d_matrix):
            return d_matrix, jnp.zeros_like(hidden)

        return jax.lax.cond((targets != IGNORED).any(), real, none, d_matrix)

    chunks = (
        _chunked(hidden, chunk_size),
        _chunked(targets, chunk_size, IGNORED),
        _chunked(d_logprobs, chunk_size),
        _chunked(d_entropy, chunk_size),
    )
    start = jnp.zeros(matrix.shape, jnp.float32) if is_trained else None
    d_matrix, d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return d_hidden, d_matrix.astype(matrix.dtype) if is_trained else None, None


_ordered.defvjp(_ordered_forward, _ordered_backward, symbolic_zeros=True)


def _chunked(x, chunk_size, fill=0):
    pad = [(0, -x.shape[0] % chunk_size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad, constant_values=fill).reshape(-1, chunk_size, *x.shape[1:])


def _logits(hidden, matrix, temperature, softcap):
    """The logits, and their slope: ∂z / ∂(hidden · matrixᵀ)."""
    logits = jnp.einsum("CD,VD->CV", hidden, matrix, preferred_element_type=jnp.float32)
    if softcap is None:
        return logits / temperature, 1.0 / temperature
    share = jnp.tanh(logits / softcap)
    return softcap * share / temperature, (1.0 - jnp.square(share)) / temperature


def _statistics(logits):
    """log p and p `[C, V]`, and the entropy `[C]`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(shifted)
    total = exp.sum(axis=-1, keepdims=True)
    logprobs, probs = shifted - jnp.log(total), exp / total
    return logprobs, probs, -(probs * logprobs).sum(axis=-1)


def _is_target(logits, targets):
    return jnp.arange(logits.shape[-1])[None, :] == targets[:, None]
