"""The cache of generation: per layer the state of its mixer, and the keys and values of attention.

Columns are positions: token t of a slot is in column t, and a query at position p sees the columns
up to p. Later columns left by an earlier, longer row are overwritten before they become visible.
The states of other mixers have no columns; a new row replaces all of a slot's. A layer that
attends to the keys and values of another has nothing here.

Keys are stored with the columns last, so that products of a query with all keys read memory
sequentially, which is 1.5 times as fast on CPUs as with the columns before the entries of a head.

Axes: B slots, S columns, K key-value heads, G query heads per key-value head, H head, P columns of
prefilled prompts.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from relax.models.attention import MASK_VALUE, attend


class Keys(NamedTuple):
    """The keys of a layer."""

    entries: jax.Array  # [B, K, H, S]


class Values(NamedTuple):
    """The values of a layer."""

    entries: jax.Array  # [B, K, S, H]


Cache = tuple[Any, ...]  # per layer the state of its mixer; slots are the first axis of its arrays
Columns = TypeVar("Columns", Keys, Values)


def empty_columns(B: int, K: int, H: int, S: int, dtype) -> tuple[Keys, Values]:
    """Keys and values of zeros."""
    return Keys(jnp.zeros((B, K, H, S), dtype)), Values(jnp.zeros((B, K, S, H), dtype))


def is_columns(state) -> bool:
    """Whether the state of a layer is keys and values, which take a column per token."""
    return isinstance(state, tuple) and any(isinstance(part, Keys) for part in state)


def has_columns_alone(cache: Cache) -> bool:
    """Whether a cache is keys and values alone, in which what stands later is not seen."""
    return all(is_columns(state) or not jax.tree.leaves(state) for state in cache)


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


def write_several(
    columns: Columns, new: jax.Array, positions: jax.Array, real: jax.Array
) -> Columns:
    """Writes `new[b, t]` `[K, H]` to column `positions[b, t]` of slot b where `real` `[B, T]`."""
    old = columns.entries
    B, K = old.shape[:2]
    slot, head = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :]
    column = jnp.where(real, positions, jnp.iinfo(jnp.int32).max)[:, :, None]
    place: tuple = (slot, head, column)
    if isinstance(columns, Keys):
        place = (slot, head, slice(None), column)
    return type(columns)(old.at[place].set(new.astype(old.dtype), mode="drop"))


def insert(cache: Cache, prefilled, slot: jax.Array, source: jax.Array) -> Cache:
    """Copies row `source` of a result of `Transformer.prefill` to a slot, and its first columns."""

    def layer(state, new):
        if not is_columns(state):
            return jax.tree.map(one, state, new)
        keys, values = (x.entries for x in state)
        k, v = (jax.lax.dynamic_slice_in_dim(x, source, 1) for x in new)  # [1, K, P, H]
        k, v = k.swapaxes(2, 3).astype(keys.dtype), v.astype(values.dtype)
        return (
            Keys(jax.lax.dynamic_update_slice(keys, k, (slot, 0, 0, 0))),
            Values(jax.lax.dynamic_update_slice(values, v, (slot, 0, 0, 0))),
        )

    def one(old, new):
        return old.at[slot].set(new[source].astype(old.dtype))

    return tuple(map(layer, cache, prefilled))


def taken(cache: Cache, slots: jax.Array | None, fresh: jax.Array) -> Cache:
    """The rows of some slots, `[C]` (None: of all); states without columns are zeros if `fresh`."""

    def layer(state):
        rows = state if slots is None else jax.tree.map(lambda x: x[slots], state)
        if is_columns(state):
            return rows
        return jax.tree.map(lambda x: jnp.where(_per_row(fresh, x), 0, x), rows)

    return tuple(map(layer, cache))


def returned(cache: Cache, slots: jax.Array | None, rows: Cache) -> Cache:
    """Puts the rows of `taken` back; those whose slot does not exist are dropped."""
    if slots is None:
        return rows
    return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), cache, rows)


def frozen(old: Cache, new: Cache, slots: jax.Array) -> Cache:
    """The new cache, with the old states without columns where `slots` `[B]` is true."""

    def layer(old, new):
        if is_columns(new):
            return new
        return jax.tree.map(lambda a, b: jnp.where(_per_row(slots, b), a, b), old, new)

    return tuple(map(layer, old, new))


def _per_row(flags: jax.Array, x: jax.Array) -> jax.Array:
    return flags.reshape(-1, *(1,) * (x.ndim - 1))


def resized(cache: Cache, slots: jax.Array, S: int) -> Cache:
    """Selects slots of a cache and extends it to S columns, or keeps the first S."""

    def layer(state):
        if not is_columns(state):
            return jax.tree.map(lambda x: x[slots], state)
        keys, values = (x.entries for x in state)
        more = max(0, S - values.shape[2])
        return (
            Keys(jnp.pad(keys[slots, ..., :S], ((0, 0), (0, 0), (0, 0), (0, more)))),
            Values(jnp.pad(values[slots, :, :S], ((0, 0), (0, 0), (0, more), (0, 0)))),
        )

    return tuple(map(layer, cache))


def attend_columns(
    q: jax.Array,
    keys: Keys,
    values: Values,
    positions: jax.Array,
    *,
    window: int | None,
    multiplier: float | None,
    softcap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of several queries per slot, `[B, T, K, G, H]`, at `positions` `[B, T]`."""
    column = jnp.arange(values.entries.shape[2])[None, None, :]
    seen = column <= positions[:, :, None]
    if window is not None:
        seen &= column > positions[:, :, None] - window
    k, v = keys.entries.transpose(0, 3, 1, 2), values.entries.swapaxes(1, 2)
    return attend(q, k, v, seen, multiplier=multiplier, softcap=softcap, sinks=sinks)


def attend_cached(
    q: jax.Array,
    keys: Keys,
    values: Values,
    positions: jax.Array,
    *,
    window: int | None,
    multiplier: float | None,
    softcap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of one query per slot, `[B, K, G, H]`, at `positions` `[B]`; `sinks` `[K, G]`."""
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
    weights = jax.nn.softmax(scores)
    if sinks is not None:
        rest = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        weights *= jax.nn.sigmoid(rest - sinks.astype(jnp.float32)[None, :, :, None])
    weights = weights.astype(v.dtype).reshape(B * K, G, -1)
    out = jnp.einsum("XGS,XSH->XGH", weights, v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype).reshape(B, K, G, H)
