"""The key-value cache of generation.

Columns are positions: token t of a slot is in column t, and a query at position p sees the columns
  up
to p. Later columns left by an earlier, longer row are overwritten before they become visible.

Keys are stored with the columns last, so that products of a query with all keys read memory
sequentially, which is 1.5 times as fast on CPUs as with the columns before the entries of a head.

Axes: B slots, S columns, K key-value heads, G query heads per key-value head, H head, P columns of
prefilled prompts.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from relax.models.attention import MASK_VALUE
from relax.models.config import TransformerConfig


class Keys(NamedTuple):
    """The keys of a layer."""

    entries: jax.Array  # [B, K, H, S]


class Values(NamedTuple):
    """The values of a layer."""

    entries: jax.Array  # [B, K, S, H]


Cache = tuple[tuple[Keys, Values], ...]
Columns = TypeVar("Columns", Keys, Values)


def empty_cache(config: TransformerConfig, B: int, S: int, dtype) -> Cache:
    """A cache of zeros."""
    K, H = config.num_key_value_heads, config.head_dim

    def layer():
        return Keys(jnp.zeros((B, K, H, S), dtype)), Values(jnp.zeros((B, K, S, H), dtype))

    return tuple(layer() for _ in range(config.num_hidden_layers))


def write(columns: Columns, new: jax.Array, positions: jax.Array) -> Columns:
    """Writes `new[b]` `[K, H]`, of one token per slot, to column `positions[b]` of slot b."""
    old = columns.entries
    B, K = old.shape[:2]
    slot, head = jnp.arange(B)[:, None], jnp.arange(K)[None, :]
    column = positions[:, None]
    place: tuple = (slot, head, column)
    if isinstance(columns, Keys):
        place = (slot, head, slice(None), column)
    new = new.astype(old.dtype)
    if old.dtype == jnp.bfloat16:  # as bits: XLA on CPUs would widen the whole cache
        old_bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
        written = jax.lax.bitcast_convert_type(_set(old_bits, new_bits, place), old.dtype)
    else:
        written = _set(old, new, place)
    return type(columns)(written)


def _set(old, new, place):
    return old.at[place].set(new, unique_indices=True, mode="promise_in_bounds")


def insert(cache: Cache, prefilled, slot: jax.Array, source: jax.Array) -> Cache:
    """Copies row `source` of a result of `Transformer.prefill` to the first columns of a slot."""

    def layer(columns, new):
        keys, values = (x.entries for x in columns)
        k, v = (jax.lax.dynamic_slice_in_dim(x, source, 1) for x in new)  # [1, K, P, H]
        k, v = k.swapaxes(2, 3).astype(keys.dtype), v.astype(values.dtype)
        return (
            Keys(jax.lax.dynamic_update_slice(keys, k, (slot, 0, 0, 0))),
            Values(jax.lax.dynamic_update_slice(values, v, (slot, 0, 0, 0))),
        )

    return tuple(map(layer, cache, prefilled))


def resized(cache: Cache, slots: jax.Array, S: int) -> Cache:
    """Selects slots of a cache and extends it to S columns (at least the present number)."""

    def layer(columns):
        keys, values = (x.entries for x in columns)
        more = S - values.shape[2]
        return (
            Keys(jnp.pad(keys[slots], ((0, 0), (0, 0), (0, 0), (0, more)))),
            Values(jnp.pad(values[slots], ((0, 0), (0, 0), (0, more), (0, 0)))),
        )

    return tuple(map(layer, cache))


def attend_cached(
    q: jax.Array,
    keys: Keys,
    values: Values,
    positions: jax.Array,
    *,
    window: int | None,
    multiplier: float | None,
    softcap: float | None,
) -> jax.Array:
    """Attention of one query per slot, `[B, K, G, H]`, at `positions` `[B]`."""
    B, K, G, H = q.shape
    q = q * (H**-0.5 if multiplier is None else multiplier)
    parts = (q, keys.entries, values.entries)
    q, k, v = (x.reshape(B * K, *x.shape[2:]) for x in parts)
    scores = jnp.einsum("XGH,XHS->XGS", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    column, last = jnp.arange(k.shape[2])[None, :], positions[:, None]
    seen = column <= last
    if window is not None:
        seen &= column > last - window
    scores = jnp.where(seen[:, None, None, :], scores.reshape(B, K, G, -1), MASK_VALUE)
    weights = jax.nn.softmax(scores).astype(v.dtype).reshape(B * K, G, -1)
    out = jnp.einsum("XGS,XSH->XGH", weights, v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype).reshape(B, K, G, H)
