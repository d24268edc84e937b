"""Log-probabilities of given tokens from hidden states, a chunk of tokens at a time.

The sampler and the trainers use the same logits: `token_logits` is the only place that computes
logits at a temperature from hidden states.

Axes: M tokens, C tokens of a chunk, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel
from relax.losses import chunks
from relax.losses.chunks import IGNORED


class TokenLogprobs(NamedTuple):
    """Per token, float32 nats; 0 where the target is `IGNORED`."""

    logprobs: jax.Array  # [M] log p(target)
    entropy: jax.Array  # [M] entropy of p


def token_logits(
    hidden: jax.Array,
    matrix: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """Logits at a temperature: cap(hidden · matrixᵀ) / temperature.

    Args:
      hidden: `[M, D]`.
      matrix: `[V, D]`.
      temperature, softcap: as for `linear_logprobs`.

    Returns:
      `[M, V]` float32.

    Example:
      >>> token_logits(jnp.eye(2), jnp.eye(2), temperature=0.5).tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    matrix = matrix.astype(hidden.dtype)
    return chunks.logits_and_slope(hidden, matrix, softcap, temperature)[0]


def linear_logprobs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 256,
) -> TokenLogprobs:
    """Log-probability of each target, log softmax(z)[target], and the entropy of softmax(z).

        z = cap(hidden · matrixᵀ) / temperature

    Processes `chunk_size` tokens at a time, those with a target first, and skips chunks without
    any. The backward pass recomputes the logits, one chunk at a time. Products have the hidden
    states' dtype and are accumulated in float32.

    Args:
      hidden: `[M, D]` the states before the targets. Rows of ignored targets do not matter.
      matrix: `[V, D]` the output matrix.
      targets: `[M]` int in [0, V) or `IGNORED`.
      temperature: above 0.
      softcap: c in cap(z) = c tanh(z / c); None: no cap.
      chunk_size: tokens whose logits exist at once (>= 1).

    Returns:
      Log-probabilities and entropies, `[M]` each.

    Raises:
      ValueError: there is no token, `chunk_size` or `temperature` is not above 0, or the shapes
        do not fit.

    Example:
      >>> out = linear_logprobs(jnp.zeros((2, 3)), jnp.ones((4, 3)), jnp.array([1, -100]))
      >>> out.logprobs.round(4)  # -log 4
      Array([-1.3863,  0.    ], dtype=float32)
    """
    if chunk_size < 1 or temperature <= 0 or not hidden.shape[0]:
        raise ValueError(
            "log-probabilities need at least one token, a chunk_size of at least 1 and a "
            f"temperature above 0, got {hidden.shape[0]} tokens, {chunk_size} and {temperature}."
        )

    targets = jnp.asarray(targets)
    chunks.check_shapes(hidden, matrix, targets)

    def of_part(hidden, matrix, targets):
        ordered, ordered_targets, order = chunks.trained_first(hidden, targets)
        chunk = min(chunk_size, hidden.shape[0])
        out = _ordered(ordered, matrix, ordered_targets, temperature, softcap, chunk)
        return tuple(jnp.zeros_like(x).at[order].set(x, unique_indices=True) for x in out)

    # Each device processes the chunks of its own tokens.
    run = parallel.per_device(of_part, (("batch",), None, ("batch",)), (("batch",),) * 2, auto=True)
    return TokenLogprobs(*run(hidden, matrix, targets))


def linear_collision(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    chunk_size: int = 256,
) -> jax.Array:
    """log Σ_v p(v)² of p = softmax(z), the log-probability that two draws agree, `[M]` nats.

    Arguments as for `linear_logprobs`, at temperature 1; 0 where the target is `IGNORED`. It has no
    gradient.

    Example:
      >>> found = linear_collision(jnp.zeros((2, 3)), jnp.ones((4, 3)), jnp.array([1, -100]))
      >>> found.round(4)  # -log 4
      Array([-1.3863,  0.    ], dtype=float32)
    """

    def collision(hidden, matrix, targets):
        narrow = matrix.astype(hidden.dtype)

        def of_row(row):
            logits = chunks.logits_and_slope(row[None], narrow, softcap)[0][0]
            return jax.nn.logsumexp(2 * logits) - 2 * jax.nn.logsumexp(logits)

        hidden = jnp.where((targets != IGNORED)[:, None], hidden, 0)
        found = jax.lax.map(of_row, hidden, batch_size=min(chunk_size, hidden.shape[0]))
        return jnp.where(targets == IGNORED, 0.0, found)

    targets = jnp.asarray(targets)
    chunks.check_shapes(hidden, matrix, targets)
    run = parallel.per_device(collision, (("batch",), None, ("batch",)), ("batch",), auto=True)
    return run(*jax.lax.stop_gradient((hidden, matrix)), targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _ordered(hidden, matrix, targets, temperature, softcap, chunk_size):
    narrow = matrix.astype(hidden.dtype)

    def body(_, chunk):
        hidden, targets = chunk

        def trained():
            logits, _ = chunks.logits_and_slope(hidden, narrow, softcap, temperature)
            logprobs, _, entropy = _statistics(logits)
            chosen = jnp.where(chunks.is_target(logits, targets), logprobs, 0).sum(axis=-1)
            return jnp.where(targets == IGNORED, 0, jnp.stack([chosen, entropy]))

        none = jnp.zeros((2, chunk_size), jnp.float32)
        return None, jax.lax.cond(chunks.has_target(targets), trained, lambda: none)

    xs = (chunks.split(hidden, chunk_size), chunks.split(targets, chunk_size, IGNORED))
    _, out = jax.lax.scan(body, None, xs)  # [n, 2, C]
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

        def trained(d_matrix):
            logits, slope = chunks.logits_and_slope(hidden, narrow, softcap, temperature)
            logprobs, probs, entropy = _statistics(logits)
            d_logits = d_logprobs[:, None] * (chunks.is_target(logits, targets) - probs)
            if with_entropy:
                d_logits -= d_entropy[:, None] * probs * (logprobs + entropy[:, None])
            d_logits = jnp.where((targets != IGNORED)[:, None], d_logits * slope, 0)
            d_hidden, d_matrix = chunks.backward(
                d_logits.astype(hidden.dtype), hidden, narrow, d_matrix
            )
            return d_matrix, d_hidden

        def skipped(d_matrix):
            return d_matrix, jnp.zeros_like(hidden)

        return jax.lax.cond(chunks.has_target(targets), trained, skipped, d_matrix)

    xs = (
        chunks.split(hidden, chunk_size),
        chunks.split(targets, chunk_size, IGNORED),
        chunks.split(d_logprobs, chunk_size),
        chunks.split(d_entropy, chunk_size),
    )
    start = jnp.zeros(matrix.shape, jnp.float32) if is_trained else None
    d_matrix, d_hidden = jax.lax.scan(body, start, xs)
    d_matrix = None if d_matrix is None else d_matrix.astype(matrix.dtype)
    return chunks.joined(d_hidden, hidden.shape[0]), d_matrix, None


_ordered.defvjp(_ordered_forward, _ordered_backward, symbolic_zeros=True)


def _statistics(logits):
    """log p and p `[C, V]`, and the entropy `[C]`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(shifted)
    total = exp.sum(axis=-1, keepdims=True)
    logprobs, probs = shifted - jnp.log(total), exp / total
    return logprobs, probs, -(probs * logprobs).sum(axis=-1)
