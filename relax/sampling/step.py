"""The compiled parts of generation, each compiled once per model, bucket and set of options.

A slot holds one row under way. Its last token is not yet in the cache: a step decodes that token
and draws the next one. So a prompt's last token is the first that a slot decodes, and no step is
wasted on the end of a row.

Axes: B slots, S columns of the cache, C prompts of one prefill, P tokens of a padded prompt,
V vocabulary, N tokens of a segment at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from relax import parallel
from relax.losses.logprobs import token_logits
from relax.models.cache import Cache, empty_cache, put, resized
from relax.models.transformer import Transformer
from relax.sampling.distribution import Rules, sample_token


class Slots(NamedTuple):
    """The state of each row on the device."""

    tokens: jax.Array  # [B] int32: the last token, to be decoded next
    positions: jax.Array  # [B] int32: where it stands
    drawn: jax.Array  # [B] int32: how many tokens the completion has
    limits: jax.Array  # [B] int32: how many it may have
    ended: jax.Array  # [B] bool; true of an empty slot
    keys: jax.Array  # [B] keys; token t is drawn with fold_in(key, t)
    seen: jax.Array | None  # [B, V] bool: tokens of prompt and completion


class StopRules(NamedTuple):
    """The ends of a row, apart from its limit."""

    eos_token_ids: jax.Array  # [E] int32
    min_new_tokens: jax.Array  # scalar


class Segment(NamedTuple):
    """The tokens that a segment has drawn."""

    tokens: jax.Array  # [N, B] int32; a row's own are the first `drawn`, the rest means nothing
    logprobs: jax.Array  # [N, B] float32
    drawn: jax.Array  # [B] int32
    ended: jax.Array  # [B] bool


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(model: Transformer, params, prompts: jax.Array):
    """Keys and values of prompts `[C, P]`, padded on the right with anything."""
    return model.apply({"params": params}, prompts, method="prefill")[1]


@functools.partial(jax.jit, static_argnames=("model", "B", "S", "with_seen"))
def empty(model: Transformer, keys: jax.Array, B: int, S: int, with_seen: bool):
    """A cache and its slots, all of them free. keys: `[B]`, of any value."""
    config, zeros = model.config, jnp.zeros((B,), jnp.int32)
    seen = jnp.zeros((B, config.vocab_size), bool) if with_seen else None
    slots = Slots(zeros, zeros, zeros, zeros, jnp.ones((B,), bool), keys, seen)
    return _pinned(empty_cache(config, B, S, model.dtype), slots)


def _pinned(cache: Cache, slots: Slots) -> tuple[Cache, Slots]:
    """Slots are shared out among the devices of a mesh, and stay where they are."""
    cache = jax.tree.map(lambda x: parallel.constrain(x, "batch", "tensor", None, None), cache)
    rows = jax.tree.map(lambda x: parallel.constrain(x, "batch", *(None,) * (x.ndim - 1)), slots)
    return cache, rows


@functools.partial(jax.jit, static_argnames=("S",))
def resize(cache: Cache, slots: Slots, index: jax.Array, S: int) -> tuple[Cache, Slots]:
    """Slots `index` alone, in a cache of S columns."""
    return _pinned(resized(cache, index, S), jax.tree.map(lambda x: x[index], slots))


@functools.partial(jax.jit, donate_argnames=("cache", "slots"))
def admit(cache: Cache, slots: Slots, prefilled, prompts, count, places, sources, rows: Slots):
    """Puts rows into slots, in the memory of the cache and slots that are given.

    Args:
      prefilled: the result of `prefill`.
      prompts: `[C, P]` with V where padded, or None where `slots.seen` is.
      count: how many rows there are; the rest of the arrays below means nothing.
      places: `[B]` int, their slots.
      sources: `[B]` int, the rows of `prefilled` that hold their prompts.
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
    """Puts those of the rows into slots whose slots are here: `mine`, of all."""
    places = places - mine[0]
    here = (jnp.arange(len(places)) < count) & (places >= 0) & (places < len(mine))
    order = jnp.argsort(~here, stable=True)
    places, sources, rows = jax.tree.map(lambda x: x[order], (places, sources, rows))
    return _admit(cache, slots, prefilled, prompts, here.sum(), places, sources, rows)


def _admit(cache, slots, prefilled, prompts, count, places, sources, rows):
    def one(i, state):
        cache, slots = state
        place = places[i]
        cache = put(cache, prefilled, place, sources[i])
        seen = slots.seen
        if seen is not None:
            row = jnp.zeros((seen.shape[1],), bool).at[prompts[sources[i]]].set(True, mode="drop")
            seen = seen.at[place].set(row.at[rows.tokens[i]].set(True))
        own = [old.at[place].set(x[i]) for old, x in zip(slots[:-1], rows[:-1], strict=True)]
        return cache, Slots._make([*own, seen])

    return jax.lax.fori_loop(0, count, one, (cache, slots))


@functools.partial(
    jax.jit, static_argnames=("model", "top_k", "N"), donate_argnames=("cache", "slots")
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
    N: int,
) -> tuple[Cache, Slots, Segment]:
    """Decodes until `steps` tokens are drawn for each row, or `stop_when` slots have ended.

    Args:
      stopped: `[B]` bool, rows that the host has ended.
      rules, top_k: how to draw.
      ends: when a row ends.
      steps: from 1 to N.
      stop_when: from 1 to B.
      N: tokens of the longest segment, for which there is room in the result.

    Returns:
      The cache and the slots, in the memory of those that were given, and what was drawn.
    """
    B = slots.tokens.shape[0]
    slots = slots._replace(ended=slots.ended | stopped)
    buffers = (jnp.zeros((N, B), jnp.int32), jnp.zeros((N, B), jnp.float32))
    before = slots.drawn

    def goes_on(state):
        i, _, slots, _ = state
        return (i < steps) & (slots.ended.sum() < stop_when)

    def step(state):
        i, cache, slots, (tokens, logprobs) = state
        hidden, cache = model.apply(
            {"params": params}, slots.tokens, slots.positions, cache, method="decode"
        )
        logits = token_logits(
            hidden, model.output_matrix(params), softcap=model.config.final_logit_softcapping
        )
        # First cut as the matrix is: to gather logits is little, to gather the matrix is much.
        logits = parallel.constrain(logits, "batch", "tensor")
        logits = parallel.constrain(logits, "batch", "replicated")
        drawn, logprob = sample_token(
            logits,
            jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn),
            rules,
            top_k=top_k,
            seen=slots.seen,
            too_short=slots.drawn < ends.min_new_tokens,
        )
        slots = _advance(slots, drawn, ends)
        return i + 1, cache, slots, (tokens.at[i].set(drawn), logprobs.at[i].set(logprob))

    state = (jnp.int32(0), cache, slots, buffers)
    _, cache, slots, (tokens, logprobs) = jax.lax.while_loop(goes_on, step, state)
    cache, slots = _pinned(cache, slots)
    drawn = Segment(tokens, logprobs, slots.drawn - before, slots.ended)
    whole = (parallel.constrain(x, *("replicated",) * x.ndim) for x in drawn)
    return cache, slots, Segment(*whole)  # every process reads all of it


def _advance(slots: Slots, drawn: jax.Array, ends: StopRules) -> Slots:
    """Slots one token further, but for those that have ended."""
    moves = ~slots.ended
    is_end = (drawn[:, None] == ends.eos_token_ids[None, :]).any(axis=1)
    count = slots.drawn + moves
    ended = slots.ended | is_end | (count >= slots.limits)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(drawn.shape[0]), drawn].max(moves)
    return slots._replace(
        tokens=jnp.where(moves, drawn, slots.tokens),
        positions=slots.positions + ~ended,  # a row that has ended stays within its columns
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
