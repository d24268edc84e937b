"""Rotary positions and causal grouped-query attention over packed rows.

Axes: B batch, T query, S key, K key-value heads, G query heads per key-value head, H head;
X = B * K.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from relax.models.config import RopeScaling, TransformerConfig

SAVED = "attention"  # the name under which a checkpoint policy finds what attention keeps
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # far from −inf, so that no row becomes NaN


def rotary_frequencies(config: TransformerConfig) -> jax.Array:
    """Radians per position of each of the H/2 planes: theta^(-2i/H), stretched by `rope_scaling`.

    Su et al., RoFormer, 2021, eq. 15; the llama3 blend is that of Llama 3.1's reference code.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    return _stretch(frequencies, config.rope_scaling)


def _stretch(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind != "llama3":
        raise ValueError(f"unknown rope scaling {scaling.kind!r}. Known: linear, llama3.")
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    # 0 where a plane turns too rarely to have been seen in full, 1 where it turns often.
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(positions: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, each `[B, T, 1, 1, H/2]` float32."""
    angles = positions.astype(jnp.float32)[:, :, None] * rotary_frequencies(config)[None, None, :]
    angles = angles[:, :, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each plane (x[i], x[i + H/2]) by its angle. x: `[B, T, K, G, H]`."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention_mask(segment_ids: jax.Array | None, B: int, T: int) -> jax.Array:
    """`[B, T, S]` bool, true where query t may see key s: s <= t and the same segment."""
    causal = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids is None:
        return jnp.broadcast_to(causal, (B, T, T))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(H)) v, softmax in float32.

    Args:
      q: `[B, T, K, G, H]`.
      k, v: `[B, S, K, H]`.
      mask: `[B, T, S]` bool.

    Returns:
      `[B, T, K, G, H]`.
    """
    B, T, K, G, H = q.shape
    # Merged axes give XLA plain batched matrix products; einsums over [B, T, K, G, H] compile to
    # strided ones that take twice the time on CPUs, backward pass included.
    q = (q * H**-0.5).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
    k = k.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    v = v.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    out = _attend(q, k, v, mask)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _attend(q, k, v, mask):
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    """Keeps the output and one number per query for the backward pass, never a [T, S] array.

    Dao et al., FlashAttention, 2022, section 3.1 and appendix B.2.
    """
    scores = _scores(q, k, mask)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("XTS,XSH->XTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total).astype(v.dtype), SAVED)
    log_total = checkpoint_name(top + jnp.log(total), SAVED)
    return out, (q, k, v, mask, out, log_total)


def _backward(residuals, d_out):
    q, k, v, mask, out, log_total = residuals
    weights = jnp.exp(_scores(q, k, mask) - log_total)
    d_weights = jnp.einsum("XTH,XSH->XTS", d_out, v, preferred_element_type=jnp.float32)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - mean)).astype(q.dtype)
    d_q = jnp.einsum("XTS,XSH->XTH", d_scores, k)
    d_k = jnp.einsum("XTS,XTH->XSH", d_scores, q)
    d_v = jnp.einsum("XTS,XTH->XSH", weights.astype(v.dtype), d_out)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _scores(q, k, mask):
    """`[X, G * T, S]` float32, LOWEST where a query may not see a key."""
    scores = jnp.einsum("XTH,XSH->XTS", q, k, preferred_element_type=jnp.float32)
    B, T, S = mask.shape
    split = scores.reshape(B, -1, T, S)  # [B, K * G, T, S]
    return jnp.where(mask[:, None], split, LOWEST).reshape(scores.shape)
