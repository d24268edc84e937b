"""Next-token cross-entropy from hidden states; the logits of a whole batch never exist at once.

Axes: B batch, T tokens of a row, M = B * T tokens in all, C tokens of a chunk, D model,
V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relax import parallel
from relax.losses import chunks
from relax.losses.chunks import IGNORED
from relax.losses.token import SFT_LOSSES


class TokenSums(NamedTuple):
    """Sums over the trained tokens, float32 scalars. Only `loss` carries a gradient."""

    loss: jax.Array  # Σ l; without options the same as nll
    nll: jax.Array  # Σ −log p(target), nats
    correct: jax.Array  # Σ 1[argmax p = target]
    entropy: jax.Array  # Σ H(p), nats
    weight: jax.Array  # number of trained tokens


class GroupSums(NamedTuple):
    """The same, and the sums over the tokens of each of S groups."""

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    entropy: jax.Array
    weight: jax.Array
    group_loss: jax.Array  # [S] Σ l
    group_weight: jax.Array  # [S] number of trained tokens


class _Objective(NamedTuple):
    """The loss of a token: f(log p(target)), smoothed, plus the penalty on log Z."""

    function: Callable[[jax.Array], jax.Array]
    smoothing: float
    z_loss: float


def next_token_targets(labels: jax.Array) -> jax.Array:
    """Converts labels in Hugging Face alignment to targets; the last position has none.

    Args:
      labels: `[B, T]` int, the token itself if it is trained, else `IGNORED` (-100).

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
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int = 256,
    softcap: float | None = None,
    groups: jax.Array | None = None,
    num_groups: int = 0,
) -> TokenSums | GroupSums:
    """Cross-entropy of `softmax(hidden @ matrixᵀ)` against `targets`, summed over trained tokens.

        Σ_m 1[target_m ≠ IGNORED] · (logsumexp_v z_mv − z_m,target_m),   z = cap(hidden · matrixᵀ)

    Processes `chunk_size` tokens at a time, trained tokens first, and skips chunks without any: a
    batch of long prompts and short completions pays for its completions only. The gradient is
    computed in the same pass as the loss, so no logits are computed twice; the gradient of a matrix
    that is not trained is omitted. Products have the hidden states' dtype and are accumulated in
    float32, as is everything after them.

    Args:
      hidden: `[M, D]` the model's last hidden states. Rows of ignored tokens do not matter.
      matrix: `[V, D]` the output matrix.
      targets: `[M]` int in [0, V) or `IGNORED`.
      loss_type: a name in `SFT_LOSSES`, whose function of log p(target) replaces the negative
        log-likelihood.
      label_smoothing: ε, in [0, 1): the loss becomes (1 - ε) l + ε mean_v(-log p_v), that of a
        target of probability 1 - ε with ε spread over the vocabulary (Szegedy et al., Rethinking
        the Inception Architecture, 2015, https://arxiv.org/abs/1512.00567, section 7).
      z_loss: c, at least 0: adds c (log Z)², Z = Σ_v e^z_v, which keeps logits from drifting
        (Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311, section 5; there 1e-4).
      chunk_size: tokens whose logits exist at once (>= 1).
      softcap: c in cap(z) = c tanh(z / c); None: no cap.
      groups: `[M]` int in [0, num_groups): the group of each token; None: no sums per group.
      num_groups: S.

    Returns:
      The sums over the trained tokens, with groups also those of each (`GroupSums`). With none, all
      are exactly 0 and so are the gradients.

    Raises:
      ValueError: there is no token, `chunk_size` is below 1, or the shapes do not fit.

    Example:
      >>> sums = linear_cross_entropy(jnp.zeros((3, 2)), jnp.ones((4, 2)), jnp.array([0, 1, -100]))
      >>> round(sums.nll.item() / sums.weight.item(), 4)  # log 4
      1.3863
    """

    objective = _Objective(SFT_LOSSES[loss_type], label_smoothing, z_loss)

    def sums(hidden, matrix, targets, groups):
        hidden, targets, order = chunks.trained_first(hidden, targets)
        groups = None if groups is None else jax.nn.one_hot(groups[order], num_groups)
        size = _checked(hidden, chunk_size)
        parts = _sums(hidden, matrix, targets, groups, size, softcap, objective)
        return tuple(part[None] for part in parts)

    chunks.check_shapes(hidden, matrix, targets)
    _checked(hidden, chunk_size)
    # Each device processes the chunks of its own tokens.
    inputs = (("batch",), None, ("batch",), ("batch",))
    outputs = (("batch",),) * (5 if groups is None else 7)
    run = parallel.per_device(sums, inputs, outputs, auto=True)
    kind = TokenSums if groups is None else GroupSums
    return kind(*(part.sum(axis=0) for part in run(hidden, matrix, targets, groups)))


def target_hits(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    chunk_size: int = 256,
    softcap: float | None = None,
) -> jax.Array:
    """`[M]` bool: whether the most likely token is the target; see `linear_cross_entropy`.

    Example:
      >>> target_hits(jnp.eye(2), jnp.eye(2), jnp.array([0, 0])).tolist()
      [True, False]
    """

    def hits(hidden, matrix, targets):
        matrix = matrix.astype(hidden.dtype)

        def hit(row):
            logits = chunks.logits_and_slope(row[0][None], matrix, softcap)[0]
            return logits[0].argmax() == row[1]

        return jax.lax.map(hit, (hidden, targets), batch_size=_checked(hidden, chunk_size))

    chunks.check_shapes(hidden, matrix, targets)
    run = parallel.per_device(hits, (("batch",), None, ("batch",)), ("batch",), auto=True)
    return run(hidden, matrix, targets)


def _checked(hidden, chunk_size):
    if chunk_size < 1 or not hidden.shape[0]:
        raise ValueError(
            "cross-entropy needs at least one token and chunks of at least one, got "
            f"{hidden.shape[0]} tokens and chunk_size={chunk_size}. Leave chunk_size at 256."
        )
    return min(chunk_size, hidden.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden, matrix, targets, groups, chunk_size, softcap, objective):
    narrow = matrix.astype(hidden.dtype)

    def body(sums, chunk):
        def trained(sums):
            return _chunk_sums(narrow, softcap, objective, sums, chunk)[0]

        return jax.lax.cond(chunks.has_target(chunk[1]), trained, lambda sums: sums, sums), None

    return jax.lax.scan(body, _zeros(groups), _split(hidden, targets, groups, chunk_size))[0]


def _sums_forward(hidden, matrix, targets, groups, chunk_size, softcap, objective):
    """The sums, with ∂loss/∂hidden and ∂loss/∂matrix, which the backward pass only scales."""
    hidden, targets = hidden.value, targets.value
    groups = None if groups is None else groups.value
    matrix, is_trained = matrix.value, matrix.perturbed
    narrow = matrix.astype(hidden.dtype)

    def body(carry, chunk):
        def trained(sums, d_matrix):
            sums, d_logits = _chunk_sums(narrow, softcap, objective, sums, chunk)
            d_hidden, d_matrix = chunks.backward(d_logits, chunk[0], narrow, d_matrix)
            return (sums, d_matrix), d_hidden

        def skipped(sums, d_matrix):
            return (sums, d_matrix), jnp.zeros_like(chunk[0])

        return jax.lax.cond(chunks.has_target(chunk[1]), trained, skipped, *carry)

    start = (_zeros(groups), jnp.zeros(matrix.shape, jnp.float32) if is_trained else None)
    split = _split(hidden, targets, groups, chunk_size)
    (sums, d_matrix), d_hidden = jax.lax.scan(body, start, split)
    d_matrix = None if d_matrix is None else d_matrix.astype(matrix.dtype)
    return sums, (chunks.joined(d_hidden, hidden.shape[0]), d_matrix)


def _sums_backward(chunk_size, softcap, objective, residuals, cotangents):
    d_hidden, d_matrix = residuals
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # the other sums are constants
        return None, None, None, None
    if d_matrix is not None:
        d_matrix *= scale.astype(d_matrix.dtype)
    return d_hidden * scale.astype(d_hidden.dtype), d_matrix, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _zeros(groups):
    scalars = (jnp.zeros((), jnp.float32),) * 5
    return scalars if groups is None else scalars + (jnp.zeros(groups.shape[1]),) * 2


def _split(hidden, targets, groups, chunk_size):
    groups = None if groups is None else chunks.split(groups, chunk_size)
    return chunks.split(hidden, chunk_size), chunks.split(targets, chunk_size, IGNORED), groups


def _chunk_sums(matrix, softcap, objective, sums, chunk):
    """Adds one chunk to the sums; also returns ∂loss/∂(hidden · matrixᵀ), `[C, V]`."""
    hidden, targets, groups = chunk
    trained = targets != IGNORED
    logits, slope = chunks.logits_and_slope(hidden, matrix, softcap)
    largest = logits.max(axis=-1, keepdims=True)
    shifted = logits - largest
    exp = jnp.exp(shifted)
    total = exp.sum(axis=-1, keepdims=True)
    hit = chunks.is_target(logits, targets)
    log_total = jnp.log(total[:, 0])
    entropy = log_total - (exp * shifted).sum(axis=-1) / total[:, 0]
    correct = logits.argmax(axis=-1) == targets
    nll = log_total - jnp.where(hit, shifted, 0).sum(axis=-1)
    loss, d_logits = nll, exp / total - hit  # of -log p(target)
    if objective.function is not SFT_LOSSES["nll"]:
        loss, pull = jax.vjp(objective.function, jnp.where(trained, -nll, 0.0))
        d_logits *= -pull(jnp.ones_like(loss))[0][:, None]
    if e := objective.smoothing:
        loss = (1 - e) * loss + e * (log_total - shifted.mean(axis=-1))
        d_logits = (1 - e) * d_logits + e * (exp / total - 1 / logits.shape[-1])
    if objective.z_loss:
        log_z = largest[:, 0] + log_total
        loss += objective.z_loss * jnp.square(log_z)
        d_logits += 2 * objective.z_loss * log_z[:, None] * (exp / total)
    parts = tuple(
        jnp.where(trained, part, 0)
        for part in (loss, nll, correct, entropy, jnp.ones_like(entropy))
    )
    totals = tuple(part.sum() for part in parts)
    if groups is not None:
        totals += tuple((parts[i][:, None] * groups).sum(axis=0) for i in (0, 4))
    sums = tuple(s + total for s, total in zip(sums, totals, strict=True))
    d_logits = jnp.where(trained[:, None], d_logits * slope, 0)
    return sums, d_logits.astype(matrix.dtype)
