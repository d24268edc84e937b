"""Compiled parts of generation, each compiled once per model, bucket and set of options.

A slot holds one row in progress. Its last token is not in the cache yet: a step decodes that token
and samples the next one. So a slot first decodes the prompt's last token, and no step is wasted at
the end of a row. A row that has ended stays as it is until its slot is given away, or the row is
extended by tokens that were not sampled and goes on.

Axes: B slots, S columns of the cache, C prompts of one prefill, P tokens of a padded prompt,
V vocabulary, N maximum tokens of a segment.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from relax import parallel
from relax.losses.logprobs import token_logits
from relax.models.cache import Cache, frozen, insert, resized, returned, taken
from relax.models.mixers import empty_cache
from relax.models.transformer import Transformer
from relax.sampling.distribution import Rules, sample_token


class Slots(NamedTuple):
    """The state of each row on the device."""

    tokens: jax.Array  # [B] int32: the last token, which is decoded next
    positions: jax.Array  # [B] int32: its position
    drawn: jax.Array  # [B] int32: tokens of the completion so far
    limits: jax.Array  # [B] int32: maximum tokens of the completion
    ended: jax.Array  # [B] bool; true for an empty slot
    keys: jax.Array  # [B] keys; token t is sampled with fold_in(key, t)
    seen: jax.Array | None  # [B, V] bool: tokens of prompt and completion


class StopRules(NamedTuple):
    """The conditions that end a row, except its limit."""

    eos_token_ids: jax.Array  # [E] int32
    min_new_tokens: jax.Array  # scalar


class Segment(NamedTuple):
    """The tokens sampled by a segment."""

    tokens: jax.Array  # [N, B] int32; the first `drawn` of a row are valid
    logprobs: jax.Array  # [N, B] float32
    drawn: jax.Array  # [B] int32
    ended: jax.Array  # [B] bool


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(model: Transformer, params, prompts: jax.Array, lengths: jax.Array):
    """Computes the states of prompts `[C, P]` of `lengths` `[C]`, padded with any token."""
    return model.apply({"params": params}, prompts, lengths, method="prefill")[1]


@functools.partial(jax.jit, static_argnames=("model", "B", "S", "with_seen"))
def empty(model: Transformer, keys: jax.Array, B: int, S: int, with_seen: bool):
    """Makes an empty cache and its free slots. keys: `[B]`, of any value."""
    config, zeros = model.config, jnp.zeros((B,), jnp.int32)
    seen = jnp.zeros((B, config.vocab_size), bool) if with_seen else None
    slots = Slots(zeros, zeros, zeros, zeros, jnp.ones((B,), bool), keys, seen)
    return pinned(empty_cache(config, B, S, model.dtype), slots)


def pinned(cache: Cache, slots: Slots) -> tuple[Cache, Slots]:
    """Shards the slots over the devices of a mesh."""

    def pin(x, *dims):
        return parallel.constrain(x, *dims, *(None,) * (x.ndim - len(dims)))

    cache = jax.tree.map(lambda x: pin(x, "batch", "tensor"), cache)
    return cache, jax.tree.map(lambda x: pin(x, "batch"), slots)


@functools.partial(jax.jit, static_argnames=("S",))
def resize(cache: Cache, slots: Slots, index: jax.Array, S: int) -> tuple[Cache, Slots]:
    """Selects slots `index` and resizes the cache to S columns."""
    return pinned(resized(cache, index, S), jax.tree.map(lambda x: x[index], slots))


@functools.partial(jax.jit, donate_argnames=("cache", "slots"))
def admit(cache: Cache, slots: Slots, prefilled, prompts, count, places, sources, rows: Slots):
    """Puts rows into slots, reusing the memory of the given cache and slots.

    Args:
      prefilled: the result of `prefill`.
      prompts: `[C, P]` with V for padding, or None if `slots.seen` is None.
      count: number of valid rows in the following arrays.
      places: `[B]` int, their slots.
      sources: `[B]` int, the rows of `prefilled` with their prompts.
      rows: `[B]` each; `seen` is None.
    """
    if parallel.layout() is None:
        return _admit(cache, slots, prefilled, prompts, count, places, sources, rows)
    cut, heads = ("batch",), ("batch", "heads")
    run = parallel.per_device(
        _admit_mine, (heads, cut, (None, "heads"), *(None,) * 5, cut), (heads, cut)
    )
    mine = jnp.arange(len(places), dtype=jnp.int32)
    return run(cache, slots, prefilled, prompts, count, places, sources, rows, mine)


def _admit_mine(cache, slots, prefilled, prompts, count, places, sources, rows, mine):
    """Puts the rows into slots whose slots are on this device: `mine`, out of all."""
    places = places - mine[0]
    here = (jnp.arange(len(places)) < count) & (places >= 0) & (places < len(mine))
    order = jnp.argsort(~here, stable=True)
    places, sources, rows = jax.tree.map(lambda x: x[order], (places, sources, rows))
    return _admit(cache, slots, prefilled, prompts, here.sum(), places, sources, rows)


def _admit(cache, slots, prefilled, prompts, count, places, sources, rows):
    def one(i, state):
        cache, slots = state
        place = places[i]
        cache = insert(cache, prefilled, place, sources[i])
        seen = slots.seen
        if seen is not None:
            row = jnp.zeros((seen.shape[1],), bool).at[prompts[sources[i]]].set(True, mode="drop")
            seen = seen.at[place].set(row.at[rows.tokens[i]].set(True))
        own = [old.at[place].set(x[i]) for old, x in zip(slots[:-1], rows[:-1], strict=True)]
        return cache, Slots._make([*own, seen])

    return jax.lax.fori_loop(0, count, one, (cache, slots))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def extend(model: Transformer, params, cache: Cache, places, ids, starts, lengths, fresh) -> Cache:
    """Appends tokens to rows of the cache, reusing its memory.

    Args:
      places: `[C]` int, the slots, B for none; None: all slots.
      ids: `[C, T]`, the tokens, padded with any.
      starts: `[C]` int, the position of the first one.
      lengths: `[C]` int, how many there are.
      fresh: `[C]` bool, slots whose rows are computed anew from position 0.
    """
    rows = taken(cache, places, fresh)
    found: Any = model.apply({"params": params}, ids, starts, lengths, rows, method="extend")
    return returned(cache, places, found[1])  # on a mesh `places` is None, and no slot moves


@functools.partial(jax.jit, donate_argnames=("slots",))
def go_on(slots: Slots, places, rows: Slots, ids) -> Slots:
    """Gives rows that have ended another turn.

    Args:
      places: `[C]` int, their slots; B for none.
      rows: `[C]` each; `seen` is None.
      ids: `[C, T]`, tokens that were appended, with V for padding; None if `slots.seen` is.
    """
    own = [old.at[places].set(x, mode="drop") for old, x in zip(slots[:-1], rows[:-1], strict=True)]
    seen = slots.seen
    if seen is not None:
        seen = seen.at[places[:, None], ids].set(True, mode="drop")
    return Slots._make([*own, seen])


@functools.partial(
    jax.jit, static_argnames=("model", "top_k", "coupled", "N"), donate_argnames=("cache", "slots")
)
def run_segment(
    model: Transformer,
    params,
    cache: Cache,
    slots: Slots,
    stopped: jax.Array,
    rules: Rules,
    ends: StopRules,
    steps: jax.Array,
    stop_when: jax.Array,
    *,
    top_k: int,
    coupled: bool = False,
    N: int,
) -> tuple[Cache, Slots, Segment]:
    """Decodes until each row has `steps` new tokens or `stop_when` slots have ended.

    Args:
      stopped: `[B]` bool, rows that the host has ended.
      rules, top_k, coupled: sampling options.
      ends: conditions that end a row.
      steps: number of steps, 1 to N.
      stop_when: number of slots, 1 to B.
      N: maximum tokens of a segment, the size of the result.

    Returns:
      The cache and the slots, in the memory of the given ones, and the sampled tokens.
    """
    B = slots.tokens.shape[0]
    slots = slots._replace(ended=slots.ended | stopped)
    buffers = (jnp.zeros((N, B), jnp.int32), jnp.zeros((N, B), jnp.float32))
    before = slots.drawn

    def continues(state):
        i, _, slots, _ = state
        return (i < steps) & (slots.ended.sum() < stop_when)

    def step(state):
        i, cache, slots, (tokens, logprobs) = state
        logits, cache = next_logits(model, params, cache, slots)
        drawn, logprob = sample_token(
            logits,
            jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn),
            rules,
            top_k=top_k,
            seen=slots.seen,
            too_short=slots.drawn < ends.min_new_tokens,
            coupled=coupled,
        )
        slots = advance(slots, drawn, ends)
        return i + 1, cache, slots, (tokens.at[i].set(drawn), logprobs.at[i].set(logprob))

    state = (jnp.int32(0), cache, slots, buffers)
    _, cache, slots, (tokens, logprobs) = jax.lax.while_loop(continues, step, state)
    cache, slots = pinned(cache, slots)
    drawn = Segment(tokens, logprobs, slots.drawn - before, slots.ended)
    whole = (parallel.constrain(x, *("replicated",) * x.ndim) for x in drawn)
    return cache, slots, Segment(*whole)  # every process reads all tokens


def next_logits(model: Transformer, params, cache: Cache, slots: Slots):
    """Decodes the last token of every slot; returns logits `[B, V]` and the cache with it."""
    found: Any = model.apply(
        {"params": params}, slots.tokens, slots.positions, cache, method="decode"
    )
    hidden, new = found
    cache = frozen(cache, new, slots.ended)
    logits = token_logits(
        hidden, model.output_matrix(params), softcap=model.config.final_logit_softcapping
    )
    # Shard like the matrix first: gathering logits is cheap, gathering the matrix is not.
    logits = parallel.constrain(logits, "batch", "tensor")
    return parallel.constrain(logits, "batch", "replicated"), cache


def advance(slots: Slots, drawn: jax.Array, ends: StopRules) -> Slots:
    """Advances the slots by one token, except finished ones."""
    moves = ~slots.ended
    is_end = (drawn[:, None] == ends.eos_token_ids[None, :]).any(axis=1)
    count = slots.drawn + moves
    ended = slots.ended | is_end | (count >= slots.limits)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(drawn.shape[0]), drawn].max(moves)
    return slots._replace(
        tokens=jnp.where(moves, drawn, slots.tokens),
        positions=slots.positions + moves,  # a finished row decodes its last token again and again
        drawn=count,
        ended=ended,
        seen=seen,
    )


@jax.jit
def row_keys(key: jax.Array, prompts: jax.Array, samples: jax.Array) -> jax.Array:
    """The key of sample j of prompt i: fold_in(fold_in(key, i), j)."""

    def one(prompt, sample):
        return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

    return jax.vmap(one)(prompts, samples)
