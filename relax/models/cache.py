"""The key-value cache of generation.

A slot's token t sits in column t: columns are positions, and a query at position p sees the columns
up to p. What an earlier, longer row left in later columns is overwritten before it becomes visible.

Axes: B slots, S columns, K key-value heads, G query heads per key-value head, H head.
"""

import jax
import jax.numpy as jnp

from relax.models.attention import LOWEST
from relax.models.config import TransformerConfig

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # per layer keys and values, each [B, K, S, H]


def empty_cache(config: TransformerConfig, B: int, S: int, dtype) -> Cache:
    """A cache of zeros."""
    shape = (B, config.num_key_value_heads, S, config.head_dim)
    layers = range(config.num_hidden_layers)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in layers)


def write(columns: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts `new[b]` into column `positions[b]` of `columns[b]`: `[B, K, H]` into `[B, K, S, H]`."""

    def one(columns, new, position):
        return jax.lax.dynamic_update_slice(columns, new[:, None], (0, position, 0))

    return jax.vmap(one)(columns, new.astype(columns.dtype), positions)


def attend_cached(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    window: int | None,
    multiplier: float | None,
    softcap: float | None,
) -> jax.Array:
    """Attention of one query per slot, `[B, K, G, H]`, at `positions` `[B]`."""
    B, K, G, H = q.shape
    q = q * (H**-0.5 if multiplier is None else multiplier)
    q, keys, values = (x.reshape(B * K, -1, H) for x in (q, keys, values))
    scores = jnp.einsum("XGH,XSH->XGS", q, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    columns, last = jnp.arange(keys.shape[1])[None, :], positions[:, None]
    seen = columns <= last
    if window is not None:
        seen &= columns > last - window
    scores = jnp.where(seen[:, None, None, :], scores.reshape(B, K, G, -1), LOWEST)
    weights = jax.nn.softmax(scores).astype(values.dtype).reshape(B * K, G, -1)
    return jnp.einsum("XGS,XSH->XGH", weights, values).reshape(B, K, G, H)
