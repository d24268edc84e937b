"""Compiled decoding of requests: every row has its own temperature, top-p and alternatives.

Axes: B slots, V vocabulary, N maximum tokens of a segment, K alternatives of a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from relax.losses.logprobs import linear_logprobs, token_logits
from relax.models.cache import Cache
from relax.models.transformer import Transformer
from relax.sampling.selection import BANNED, draw, greedy, nucleus
from relax.sampling.step import Slots, StopRules, advance, next_logits, pinned

ALTERNATIVES = 20  # K, the most that OpenAI's API gives


class Settings(NamedTuple):
    """Sampling settings of each slot."""

    temperature: jax.Array  # [B] float32; 0: greedy
    top_p: jax.Array  # [B] float32; 1: off
    alternatives: jax.Array  # [B] bool: whether the most likely tokens are wanted too


class Chosen(NamedTuple):
    """A token per row, and log-probabilities in nats."""

    tokens: jax.Array  # [B] int32
    logprobs: jax.Array  # [B] float32: the model's, at temperature 1
    sampled_logprobs: jax.Array  # [B] float32: under the distribution that was sampled from
    top_tokens: jax.Array  # [B, K] int32: the most likely ones; 0 in rows that want none
    top_logprobs: jax.Array  # [B, K] float32, the model's


class Sampled(NamedTuple):
    """The tokens sampled by a segment."""

    chosen: Chosen  # [N, B, ...]; the first `drawn` of a row are valid
    drawn: jax.Array  # [B] int32
    ended: jax.Array  # [B] bool


def choose(logits: jax.Array, keys: jax.Array, settings: Settings) -> Chosen:
    """Samples one token per row, each with its own settings.

    Args:
      logits: `[B, V]` float32.
      keys: `[B]`.
    """
    is_greedy = settings.temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, settings.temperature)[:, None]

    def truncated():
        lowest = jnp.where(settings.top_p < 1, nucleus(scaled, settings.top_p), BANNED)
        return jnp.where(scaled >= lowest[:, None], scaled, BANNED)

    kept = jax.lax.cond((settings.top_p < 1).any(), truncated, lambda: scaled)
    best, best_logprobs = greedy(logits)
    drawn, drawn_logprobs = draw(keys, kept)
    tokens = jnp.where(is_greedy, best, drawn)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - normaliser

    def top():
        found, ids = jax.lax.top_k(logits, _alternatives(logits))
        return ids.astype(jnp.int32), found - normaliser[:, None]

    def none():
        shape = (logits.shape[0], _alternatives(logits))
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    top_tokens, top_logprobs = jax.lax.cond(settings.alternatives.any(), top, none)
    sampled = jnp.where(is_greedy, best_logprobs, drawn_logprobs)
    return Chosen(tokens, logprobs, sampled, top_tokens, top_logprobs)


def _alternatives(logits: jax.Array) -> int:
    return min(ALTERNATIVES, logits.shape[-1])


@functools.partial(jax.jit, static_argnames=("model", "N"), donate_argnames=("cache", "slots"))
def run_requests(
    model: Transformer,
    params,
    cache: Cache,
    slots: Slots,
    stopped: jax.Array,
    settings: Settings,
    ends: StopRules,
    steps: jax.Array,
    stop_when: jax.Array,
    *,
    N: int,
) -> tuple[Cache, Slots, Sampled]:
    """Decodes until each row has `steps` new tokens or `stop_when` slots have ended.

    Arguments and result as for `relax.sampling.step.run_segment`.
    """
    B, V = slots.tokens.shape[0], model.config.vocab_size
    slots = slots._replace(ended=slots.ended | stopped)
    before = slots.drawn
    shapes = jax.eval_shape(choose, jax.ShapeDtypeStruct((B, V), jnp.float32), slots.keys, settings)
    buffers = jax.tree.map(lambda x: jnp.zeros((N, *x.shape), x.dtype), shapes)

    def continues(state):
        i, _, slots, _ = state
        return (i < steps) & (slots.ended.sum() < stop_when)

    def step(state):
        i, cache, slots, buffers = state
        logits, cache = next_logits(model, params, cache, slots)
        keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn)
        chosen = choose(logits, keys, settings)
        slots = advance(slots, chosen.tokens, ends)
        buffers = jax.tree.map(lambda buffer, x: buffer.at[i].set(x), buffers, chosen)
        return i + 1, cache, slots, buffers

    state = (jnp.int32(0), cache, slots, buffers)
    _, cache, slots, buffers = jax.lax.while_loop(continues, step, state)
    cache, slots = pinned(cache, slots)
    return cache, slots, Sampled(buffers, slots.drawn - before, slots.ended)


@functools.partial(jax.jit, static_argnames=("model", "K"))
def prompt_logprobs(model: Transformer, params, prompt: jax.Array, *, K: int):
    """Log-probabilities of a prompt's own tokens, each given those before it.

    Args:
      prompt: `[T]` int, padded on the right with any token.
      K: number of alternatives; 0: none.

    Returns:
      `[T]` log-probabilities, 0 for the first token; and the most likely tokens `[T, K]` and their
      log-probabilities.
    """
    hidden = model.apply({"params": params}, prompt[None, :], method="hidden_states")[0]
    matrix, softcap = model.output_matrix(params), model.config.final_logit_softcapping
    found = linear_logprobs(hidden[:-1], matrix, prompt[1:], softcap=softcap).logprobs

    def alternatives(state):
        logits = token_logits(state[None, :], matrix, softcap=softcap)[0]
        top, ids = jax.lax.top_k(logits, K)
        return ids.astype(jnp.int32), top - jax.nn.logsumexp(logits)

    ids, top = jax.lax.map(alternatives, hidden[:-1], batch_size=64)
    first = ((1, 0), (0, 0))
    return jnp.pad(found, (1, 0)), jnp.pad(ids, first), jnp.pad(top, first)
