"""Divergence of a student's next-token distribution from its teacher's.

The teacher is one model or several, or the log-probabilities of its most likely tokens. Logits of
all tokens never exist at once, neither the student's nor the teacher's.

Axes: M tokens, C tokens of a chunk, D model, V vocabulary, k most likely tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel
from relax.losses import chunks
from relax.losses.chunks import IGNORED

TINY = 1e-37  # below it a probability counts as this


class TeacherStates(NamedTuple):
    """One teacher, softmax(cap(hidden · matrixᵀ) / temperature); its arrays get no gradient.

    Attributes:
      hidden: `[M, D]` states; D may differ from the student's.
      matrix: `[V, D]` output matrix.
      weight: its share among several teachers, above 0; their sum counts as 1.
      softcap: c in cap(z) = c tanh(z / c); None: no cap.
    """

    hidden: jax.Array
    matrix: jax.Array
    weight: float = 1.0
    softcap: float | None = None


class TopLogprobs(NamedTuple):
    """The most likely tokens of a teacher, at the temperature of the loss, and all others as one.

    Attributes:
      ids: `[M, k]` int, distinct in each row, the most likely one first; k < V.
      logprobs: `[M, k + 1]` nats: those of `ids`, and that of all other tokens together.
    """

    ids: jax.Array
    logprobs: jax.Array


class DivergenceSums(NamedTuple):
    """Sums over the masked-in tokens, float32 scalars. Only `divergence` carries a gradient."""

    divergence: jax.Array  # Σ D, nats
    agreement: jax.Array  # Σ 1[student and teacher have the same most likely token]
    entropy: jax.Array  # Σ entropy of the student, nats
    weight: jax.Array  # number of tokens


def linear_divergence(
    hidden: jax.Array,
    matrix: jax.Array,
    teacher: Sequence[TeacherStates] | TopLogprobs,
    mask: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    top_k: int = 0,
    chunk_size: int = 256,
) -> DivergenceSums:
    """Generalised Jensen-Shannon divergence of the teacher p and the student q, summed over tokens.

        q = softmax(cap(hidden · matrixᵀ) / temperature),   p = Σ_i w_i p_i over the teachers
        m = β p + (1 − β) q
        D = β KL(p ‖ m) + (1 − β) KL(q ‖ m);   KL(p ‖ q) for β = 0,   KL(q ‖ p) for β = 1

    With the teacher's k most likely tokens alone, p and q are distributions over k + 1 cells, the
    last of which is all other tokens.

    Processes `chunk_size` tokens at a time, masked-in tokens first, and skips chunks without any.
    The gradient is computed in the same pass as the divergence, so no logits are computed twice.
    Products have the hidden states' dtype and are accumulated in float32. Where matrices have
    different numbers of rows, such as padding of the vocabulary, those that all have are compared.

    Args:
      hidden: `[M, D]` the student's states. Rows outside of the mask do not matter.
      matrix: `[V, D]` the student's output matrix.
      teacher: one or more teachers, or stored log-probabilities.
      mask: `[M]` bool, true on the tokens that count.
      beta: β in [0, 1], as in TRL: 0 is the forward KL divergence, 1 the reverse one.
      temperature: above 0, of student and teacher. The divergence is not multiplied by its square.
      softcap: c in cap(z) = c tanh(z / c), of the student; None: no cap.
      top_k: k, in [0, V); 0: the whole vocabulary. Stored log-probabilities have their own k.
      chunk_size: tokens whose logits exist at once (>= 1).

    Returns:
      The sums over the mask; 0, with gradient 0, if it is empty.

    Raises:
      ValueError: an argument is out of range, or shapes do not fit.

    Example:
      >>> student, matrix = jnp.array([[0.0, 0.0]]), jnp.eye(2)
      >>> teacher = [TeacherStates(jnp.log(jnp.array([[0.75, 0.25]])), jnp.eye(2))]
      >>> sums = linear_divergence(student, matrix, teacher, jnp.array([True]), beta=0.0)
      >>> round(sums.divergence.item(), 4)  # 0.75 log 1.5 + 0.25 log 0.5
      0.1308

    References:
      Agarwal et al., On-Policy Distillation of Language Models, 2023,
        https://arxiv.org/abs/2306.13649, eq. 1
    """
    targets = jnp.where(mask, 0, IGNORED)
    chunks.check_shapes(hidden, matrix, targets)
    is_stored = isinstance(teacher, TopLogprobs)
    heads: tuple[jax.Array, ...] = ()
    teachers: tuple[tuple[float, float | None], ...] = ()
    if isinstance(teacher, TopLogprobs):
        per_token: tuple[jax.Array, ...] = (teacher.ids, teacher.logprobs)
        top_k = teacher.ids.shape[-1]
    else:
        per_token, heads, teachers = _parts(teacher, len(matrix))
        matrix = matrix if not heads or len(heads[0]) == len(matrix) else matrix[: len(heads[0])]
    _check(hidden, matrix, per_token, is_stored, beta, temperature, top_k, chunk_size)
    options = _Options(beta, temperature, softcap, top_k, min(chunk_size, len(hidden)), teachers)
    per_token, heads = jax.lax.stop_gradient((per_token, heads))

    def sums(hidden, matrix, targets, per_token, heads):
        hidden, targets, order = chunks.trained_first(hidden, targets)
        parts = _sums(hidden, matrix, targets, [x[order] for x in per_token], heads, options)
        return tuple(part[None] for part in parts)

    # Each device processes the chunks of its own tokens.
    inputs = (("batch",), None, ("batch",), ("batch",), None)
    run = parallel.per_device(sums, inputs, (("batch",),) * 4, auto=True)
    return DivergenceSums(*(x.sum() for x in run(hidden, matrix, targets, per_token, heads)))


def top_logprobs(
    teacher: Sequence[TeacherStates], k: int, *, temperature: float = 1.0, chunk_size: int = 256
) -> TopLogprobs:
    """The k most likely tokens of the teacher of every token, and the rest; see `TopLogprobs`.

    Args:
      teacher: as for `linear_divergence`.
      k: in [1, V).
      temperature: above 0.
      chunk_size: tokens whose logits exist at once (>= 1).

    Example:
      >>> teacher = [TeacherStates(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.eye(3))]
      >>> found = top_logprobs(teacher, 1)
      >>> found.ids.tolist(), jnp.exp(found.logprobs).round(4).tolist()
      ([[0]], [[0.5, 0.5]])
    """
    hidden, heads, teachers = _parts(teacher)

    def of_chunk(states):
        logprobs = _teacher_logprobs(states, heads, teachers, temperature)
        ids = jax.lax.top_k(logprobs, k)[1]
        return ids, _cells(logprobs, ids)

    count = len(hidden[0])
    size = min(chunk_size, count)
    ids, logprobs = jax.lax.map(of_chunk, tuple(chunks.split(x, size) for x in hidden))
    return TopLogprobs(chunks.joined(ids, count), chunks.joined(logprobs, count))


class _Options(NamedTuple):
    beta: float
    temperature: float
    softcap: float | None
    top_k: int
    chunk_size: int
    teachers: tuple[tuple[float, float | None], ...]  # weight and cap of each; () if stored


def _parts(teacher: Sequence[TeacherStates], rows: int = 2**31):
    """States, output matrices up to the common number of rows, and weight and cap of each."""
    most = min([rows, *(len(one.matrix) for one in teacher)])
    total = sum(one.weight for one in teacher)
    heads = tuple(one.matrix[:most].astype(one.hidden.dtype) for one in teacher)
    teachers = tuple((one.weight / total, one.softcap) for one in teacher)
    return tuple(one.hidden for one in teacher), heads, teachers


def _check(hidden, matrix, per_token, is_stored, beta, temperature, top_k, chunk_size) -> None:
    if not 0 <= beta <= 1 or temperature <= 0 or chunk_size < 1 or not len(hidden):
        raise ValueError(
            "a divergence needs beta in [0, 1], a temperature above 0, a chunk_size of at least 1 "
            f"and a token, got {beta}, {temperature}, {chunk_size} and {len(hidden)} tokens."
        )
    if not 0 <= top_k < len(matrix) or (is_stored and not top_k):
        raise ValueError(
            f"top_k must leave a token for the rest, got {top_k} of {len(matrix)} tokens. Use "
            "0, without stored log-probabilities, for the whole vocabulary."
        )
    if not per_token or any(len(x) != len(hidden) for x in per_token):
        shapes = ", ".join(str(x.shape) for x in per_token) or "none"
        raise ValueError(
            f"the teacher's arrays must have a row for each of {len(hidden)} tokens, got {shapes}."
        )
    if is_stored and per_token[1].shape[-1] != top_k + 1:
        raise ValueError(
            f"logprobs must be those of {top_k} ids and of the rest, got {per_token[1].shape}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sums(hidden, matrix, targets, per_token, heads, options):
    narrow = matrix.astype(hidden.dtype)

    def body(sums, chunk):
        def trained(sums):
            return _chunk_sums(narrow, heads, options, sums, chunk)[0]

        return jax.lax.cond(chunks.has_target(chunk[1]), trained, lambda sums: sums, sums), None

    return jax.lax.scan(body, _zeros(), _split(hidden, targets, per_token, options))[0]


def _sums_forward(hidden, matrix, targets, per_token, heads, options):
    """The sums, with ∂D/∂hidden and ∂D/∂matrix, which the backward pass only scales."""
    is_trained = matrix.perturbed
    hidden, matrix, targets, per_token, heads = jax.tree.map(
        lambda x: x.value, (hidden, matrix, targets, per_token, heads), is_leaf=_is_argument
    )
    narrow = matrix.astype(hidden.dtype)

    def body(carry, chunk):
        def trained(sums, d_matrix):
            sums, d_logits = _chunk_sums(narrow, heads, options, sums, chunk)
            d_hidden, d_matrix = chunks.backward(d_logits, chunk[0], narrow, d_matrix)
            return (sums, d_matrix), d_hidden

        def skipped(sums, d_matrix):
            return (sums, d_matrix), jnp.zeros_like(chunk[0])

        return jax.lax.cond(chunks.has_target(chunk[1]), trained, skipped, *carry)

    start = (_zeros(), jnp.zeros(matrix.shape, jnp.float32) if is_trained else None)
    xs = _split(hidden, targets, per_token, options)
    (sums, d_matrix), d_hidden = jax.lax.scan(body, start, xs)
    d_matrix = None if d_matrix is None else d_matrix.astype(matrix.dtype)
    return sums, (chunks.joined(d_hidden, len(hidden)), d_matrix)


def _sums_backward(options, residuals, cotangents):
    d_hidden, d_matrix = residuals
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # the other sums are constants
        return (None,) * 5
    if d_matrix is not None:
        d_matrix *= scale.astype(d_matrix.dtype)
    return d_hidden * scale.astype(d_hidden.dtype), d_matrix, None, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _is_argument(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _zeros():
    return tuple(jnp.zeros((), jnp.float32) for _ in DivergenceSums._fields)


def _split(hidden, targets, per_token, options):
    C = options.chunk_size
    parts = tuple(chunks.split(x, C) for x in per_token)
    return chunks.split(hidden, C), chunks.split(targets, C, IGNORED), parts


def _chunk_sums(matrix, heads, options, sums, chunk):
    """Adds one chunk to the sums; also returns ∂D/∂(hidden · matrixᵀ), `[C, V]`."""
    hidden, targets, per_token = chunk
    mask = targets != IGNORED
    logits, slope = chunks.logits_and_slope(hidden, matrix, options.softcap, options.temperature)
    log_q = jax.nn.log_softmax(logits)
    q = jnp.exp(log_q)
    if options.teachers:
        log_p = _teacher_logprobs(per_token, heads, options.teachers, options.temperature)
        ids = jax.lax.top_k(log_p, options.top_k)[1] if options.top_k else None
        cells = log_p if ids is None else _cells(log_p, ids)
        best = log_p.argmax(axis=-1)
    else:
        ids, cells = per_token
        best = ids[:, 0]
    if ids is None:
        divergence, d_log_q = _divergence(cells, log_q, options.beta)
    else:
        student = _cells(log_q, ids)
        divergence, d_cells = _divergence(cells, student, options.beta)
        # ∂ log q(rest) / ∂ log q_v is q_v's share of the rest.
        d_log_q = jnp.exp(log_q - student[:, -1:]) * d_cells[:, -1:]
        d_log_q = d_log_q.at[jnp.arange(len(ids))[:, None], ids].set(d_cells[:, :-1])
    d_logits = d_log_q - q * d_log_q.sum(axis=-1, keepdims=True)
    parts = (
        divergence,
        logits.argmax(axis=-1) == best,
        -(q * log_q).sum(axis=-1),
        jnp.ones_like(divergence),
    )
    sums = tuple(s + jnp.where(mask, p, 0).sum() for s, p in zip(sums, parts, strict=True))
    return sums, jnp.where(mask[:, None], d_logits * slope, 0).astype(matrix.dtype)


def _teacher_logprobs(hidden, heads, teachers, temperature: float) -> jax.Array:
    """log Σ_i w_i p_i of one or more teachers, `[C, V]`, from what `_parts` returns."""
    parts = []
    for states, head, (weight, softcap) in zip(hidden, heads, teachers, strict=True):
        logits, _ = chunks.logits_and_slope(states, head, softcap, temperature)
        parts.append(jax.nn.log_softmax(logits) + jnp.log(weight))
    return functools.reduce(jnp.logaddexp, parts)


def _cells(logprobs: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens `ids` `[C, k]` and of all others together, `[C, k + 1]`."""
    top = jnp.take_along_axis(logprobs, ids, axis=-1)
    others = logprobs.at[jnp.arange(len(ids))[:, None], ids].set(-jnp.inf)
    return jnp.concatenate([top, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


def _divergence(log_p: jax.Array, log_q: jax.Array, beta: float):
    """D of each row, and its derivatives with respect to log q up to multiples of q.

    Multiples of q change nothing for the logits, since Σ q = 1.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if beta == 0:
        return (p * (log_p - log_q)).sum(axis=-1), -p
    if beta == 1:
        terms = q * (log_q - log_p)
        return terms.sum(axis=-1), terms
    log_m = jnp.log(jnp.maximum(beta * p + (1 - beta) * q, TINY))
    of_q = (1 - beta) * q * (log_q - log_m)
    return (beta * p * (log_p - log_m) + of_q).sum(axis=-1), of_q
