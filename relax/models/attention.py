"""Causal grouped-query attention over packed rows.

Axes: B batch, T query, S key, K key-value heads, G query heads per key-value head, H head;
X = B * K.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from relax import parallel

SAVED = "attention"  # name for checkpoint policies of the values that attention saves
BLOCK = 256  # queries and keys per block of scores, for longer rows
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: no NaN in masked rows


def attention_mask(
    segment_ids: jax.Array | None,
    B: int,
    T: int,
    window: int | None = None,
    parent_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """The keys that each query sees: itself and earlier tokens of its segment and its parent.

    Args:
      segment_ids: `[B, T]` int; None: one segment per row.
      window: a query sees keys less than `window` positions before its own; None: all.
      parent_ids: `[B, T]` int, the segment, earlier in the row, that each token sees besides its
        own (0: none); None: no segment has a parent.
      positions: `[B, T]` int, of each token in its document, parent included. Needed only for
        windows with `parent_ids`: a parent does not stand right before every child.

    Returns:
      `[B, T, S]` bool.
    """
    places = jnp.arange(T)
    distance = (places[:, None] - places[None, :])[None]
    seen = distance >= 0
    if window is not None:
        if parent_ids is not None:
            assert positions is not None, "a window over parents needs positions"
            distance = positions[:, :, None] - positions[:, None, :]
        seen &= distance < window
    if segment_ids is None:
        return jnp.broadcast_to(seen, (B, T, T))
    keys = segment_ids[:, None, :]
    visible = segment_ids[:, :, None] == keys
    if parent_ids is not None:
        parents = parent_ids[:, :, None]
        visible |= (parents > 0) & (parents == keys)
    return seen & visible


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    multiplier: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(cap(q kᵀ · multiplier)) v, softmax in float32; cap(x) = c tanh(x / c).

    A sink is one more score of a head, of a key that every query sees and whose value is 0.
    Agarwal et al., gpt-oss-120b & gpt-oss-20b Model Card, 2025, section 2.

    Args:
      q: `[B, T, K, G, H]`.
      k, v: `[B, S, K, H]`.
      mask: `[B, T, S]` bool.
      multiplier: None: 1 / sqrt(H).
      softcap: c; None: no cap.
      sinks: `[K, G]`, the score of each head's sink; None: none.
      block: queries and keys per block of scores, for longer rows. Blocks without any visible key
        (the future, outside the window, other documents) are skipped.

    Returns:
      `[B, T, K, G, H]`.
    """
    heads = ("batch", None, "heads")
    # Rows and heads are merged below, and XLA cannot shard the merged axis: run per device.
    run = parallel.per_device(
        functools.partial(_attend_part, multiplier=multiplier, softcap=softcap, block=block),
        (heads, heads, heads, ("batch",), ("heads",)),
        heads,
    )
    return run(q, k, v, mask, sinks)


def _attend_part(q, k, v, mask, sinks, *, multiplier, softcap, block):
    B, T, K, G, H = q.shape
    # Merged axes give XLA plain batched matrix products; einsums over [B, T, K, G, H] compile to
    # strided ones that take twice the time on CPUs, backward pass included.
    multiplier = H**-0.5 if multiplier is None else multiplier
    q = (q * multiplier).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, H)
    k = k.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    v = v.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32), (B, 1))[:, :, None, None]
    out = _attend(softcap, block, q, k, v, mask, sinks)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(softcap, block, q, k, v, mask, sinks):
    return _forward(softcap, block, q, k, v, mask, sinks)[0]


def _forward(softcap, block, q, k, v, mask, sinks):
    """Saves the output and one number per query for the backward pass, never a [T, S] array.

    Dao et al., FlashAttention, 2022, section 3.1 and appendix B.2.
    """
    if max(mask.shape[1:]) <= block:
        top, total, out = _weighted(softcap, q, k, v, mask)
    else:
        top, total, out = _forward_blocks(softcap, q, k, v, _Blocks(mask, block))
    if sinks is not None:  # [X, G, 1, 1]
        one, zero = jnp.float32(1.0), jnp.float32(0.0)
        top, total, out = _merge((top, total, out), (sinks, one, zero))
    out = checkpoint_name((out / total).astype(v.dtype), SAVED)
    log_total = checkpoint_name(top + jnp.log(total), SAVED)
    return out, (q, k, v, mask, sinks, out, log_total)


def _backward(softcap, block, residuals, d_out):
    q, k, v, mask, sinks, out, log_total = residuals
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    if max(mask.shape[1:]) <= block:
        d_q, d_k, d_v = _gradients(softcap, q, k, v, mask, log_total, mean, d_out)
    else:
        rows = (q, log_total, mean, d_out)
        d_q, d_k, d_v = _backward_blocks(softcap, rows, k, v, _Blocks(mask, block))
    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks - log_total) * mean).sum(axis=2, keepdims=True)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_sinks


_attend.defvjp(_forward, _backward)


def _weighted(softcap, q, k, v, mask):
    """Largest score, Σ w and Σ w v with w = exp(score - largest), float32: `[X, G, T, 1 or H]`."""
    scores, _ = _scores(softcap, q, k, mask)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("XTS,XSH->XTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return tuple(x.reshape(*q.shape[:3], -1) for x in (top, total, out))


def _gradients(softcap, q, k, v, mask, log_total, mean, d_out):
    """The gradients of q, k and v, float32."""
    shape = q.shape
    scores, slope = _scores(softcap, q, k, mask)
    q, log_total, mean, d_out = (
        x.reshape(x.shape[0], -1, x.shape[3]) for x in (q, log_total, mean, d_out)
    )
    weights = jnp.exp(scores - log_total)
    d_weights = jnp.einsum("XTH,XSH->XTS", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - mean) * slope).astype(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_q = product("XTS,XSH->XTH", d_scores, k).reshape(shape)
    d_k = product("XTS,XTH->XSH", d_scores, q)
    d_v = product("XTS,XTH->XSH", weights.astype(v.dtype), d_out)
    return d_q, d_k, d_v


def _scores(softcap, q, k, mask):
    """Scores `[X, G * T, S]` float32, MASK_VALUE where masked, and the slope of the cap."""
    q = q.reshape(q.shape[0], -1, q.shape[3])
    scores = jnp.einsum("XTH,XSH->XTS", q, k, preferred_element_type=jnp.float32)
    slope = jnp.float32(1.0)
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - jnp.square(capped)
    B, T, S = mask.shape
    split = scores.reshape(B, -1, T, S)  # [B, K * G, T, S]
    return jnp.where(mask[:, None], split, MASK_VALUE).reshape(scores.shape), slope


class _Blocks:
    """A mask split into n x m blocks; `seen[n, m]`: whether any query sees any key."""

    def __init__(self, mask, block):
        self.T, self.S = mask.shape[1:]
        self.n, self.m = (-(-length // block) for length in mask.shape[1:])
        self.mask = _cut(_cut(mask, 2, self.m), 2, self.n)  # [n, m, B, T', S']
        self.seen = self.mask.any(axis=(2, 3, 4))


def _forward_blocks(softcap, q, k, v, blocks):
    """As `_weighted`, one block of scores at a time; skips fully masked blocks."""
    keys = (_cut(k, 1, blocks.m), _cut(v, 1, blocks.m))

    def over_queries(_, row):
        q, mask, seen = row

        def over_keys(sums, column):
            k, v, mask, seen = column
            return jax.lax.cond(
                seen, lambda: _merge(sums, _weighted(softcap, q, k, v, mask)), lambda: sums
            ), None

        empty = jnp.zeros((*q.shape[:3], 1), jnp.float32)
        sums = (empty + MASK_VALUE, empty, jnp.zeros(q.shape, jnp.float32))
        return None, jax.lax.scan(over_keys, sums, (*keys, mask, seen))[0]

    rows = (_cut(q, 2, blocks.n), blocks.mask, blocks.seen)
    return tuple(_join(x, 2, blocks.T) for x in jax.lax.scan(over_queries, None, rows)[1])


def _merge(one, other):
    """The result of `_weighted` for two sets of keys, from its results for each."""
    top = jnp.maximum(one[0], other[0])
    a, b = jnp.exp(one[0] - top), jnp.exp(other[0] - top)
    return top, a * one[1] + b * other[1], a * one[2] + b * other[2]


def _backward_blocks(softcap, rows, k, v, blocks):
    """As `_gradients`, one block of scores at a time."""
    keys = (_cut(k, 1, blocks.m), _cut(v, 1, blocks.m))

    def over_queries(d_keys, row):
        q, log_total, mean, d_out, mask, seen = row

        def over_keys(d_q, column):
            k, v, d_k, d_v, mask, seen = column

            def add():
                parts = _gradients(softcap, q, k, v, mask, log_total, mean, d_out)
                return tuple(a + b for a, b in zip((d_q, d_k, d_v), parts, strict=True))

            d_q, *d_kv = jax.lax.cond(seen, add, lambda: (d_q, d_k, d_v))
            return d_q, tuple(d_kv)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, d_keys = jax.lax.scan(over_keys, d_q, (*keys, *d_keys, mask, seen))
        return d_keys, d_q

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys)
    xs = (*(_cut(x, 2, blocks.n) for x in rows), blocks.mask, blocks.seen)
    d_keys, d_q = jax.lax.scan(over_queries, zeros, xs)
    return _join(d_q, 2, blocks.T), *(_join(x, 1, blocks.S) for x in d_keys)


def _cut(x, axis, n):
    """Splits an axis into n equal blocks along a new first axis; pads the last one with zeros."""
    length = x.shape[axis]
    size = -(-length // n)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, n * size - length)
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(blocks, axis, length):
    """Undoes `_cut`."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
