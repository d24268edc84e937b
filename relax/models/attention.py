"""Causal grouped-query attention over packed rows.

Axes: B batch, T query, S key, K key-value heads, G query heads per key-value head, H head;
X = B * K.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # the name under which a checkpoint policy finds what attention keeps
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # far from −inf, so that no row becomes NaN


def attention_mask(
    segment_ids: jax.Array | None, B: int, T: int, window: int | None = None
) -> jax.Array:
    """`[B, T, S]` bool, true where query t may see key s: t - window < s <= t, same segment."""
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if segment_ids is None:
        return jnp.broadcast_to(seen[None], (B, T, T))
    return seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    multiplier: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(cap(q kᵀ · multiplier)) v, softmax in float32; cap(x) = c tanh(x / c).

    Args:
      q: `[B, T, K, G, H]`.
      k, v: `[B, S, K, H]`.
      mask: `[B, T, S]` bool.
      multiplier: None: 1 / sqrt(H).
      softcap: c; None: no cap.

    Returns:
      `[B, T, K, G, H]`.
    """
    B, T, K, G, H = q.shape
    # Merged axes give XLA plain batched matrix products; einsums over [B, T, K, G, H] compile to
    # strided ones that take twice the time on CPUs, backward pass included.
    multiplier = H**-0.5 if multiplier is None else multiplier
    q = (q * multiplier).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
    k = k.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    v = v.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    out = _attend(softcap, q, k, v, mask)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, mask):
    return _forward(softcap, q, k, v, mask)[0]


def _forward(softcap, q, k, v, mask):
    """Keeps the output and one number per query for the backward pass, never a [T, S] array.

    Dao et al., FlashAttention, 2022, section 3.1 and appendix B.2.
    """
    scores, _ = _scores(softcap, q, k, mask)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("XTS,XSH->XTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total).astype(v.dtype), SAVED)
    log_total = checkpoint_name(top + jnp.log(total), SAVED)
    return out, (q, k, v, mask, out, log_total)


def _backward(softcap, residuals, d_out):
    q, k, v, mask, out, log_total = residuals
    scores, slope = _scores(softcap, q, k, mask)
    weights = jnp.exp(scores - log_total)
    d_weights = jnp.einsum("XTH,XSH->XTS", d_out, v, preferred_element_type=jnp.float32)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - mean) * slope).astype(q.dtype)
    d_q = jnp.einsum("XTS,XSH->XTH", d_scores, k)
    d_k = jnp.einsum("XTS,XTH->XSH", d_scores, q)
    d_v = jnp.einsum("XTS,XTH->XSH", weights.astype(v.dtype), d_out)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _scores(softcap, q, k, mask):
    """`[X, G * T, S]` float32, LOWEST where a query may not see a key; and the cap's slope."""
    scores = jnp.einsum("XTH,XSH->XTS", q, k, preferred_element_type=jnp.float32)
    slope = jnp.float32(1.0)
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - jnp.square(capped)
    B, T, S = mask.shape
    split = scores.reshape(B, -1, T, S)  # [B, K * G, T, S]
    return jnp.where(mask[:, None], split, LOWEST).reshape(scores.shape), slope
