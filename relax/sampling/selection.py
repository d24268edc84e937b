"""Selection over a vocabulary without sorting: largest logits, nucleus, sampling, argmax.

On CPUs XLA's sort, selection and argmax of 50,000 numbers are slow; these functions take a 6th to a
30th of the time and give the same values. A row is split into `CELLS` cells, only a few of which
need to be searched.

Axes: B rows, V vocabulary, C cells of V / C tokens each.
"""

import jax
import jax.numpy as jnp
import numpy as np

CELLS = 256
BANNED = -jnp.inf


def largest(logits: jax.Array, k: int) -> jax.Array:
    """The k largest logits of each row, `[B, k]`, in descending order.

    They are in the k cells with the largest maxima; no other cell is searched.
    """
    cells = _cells(logits)
    chosen = jax.lax.top_k(cells.max(axis=2), min(k, cells.shape[1]))[1]
    found = jnp.take_along_axis(cells, chosen[:, :, None], axis=1)
    return jax.lax.top_k(found.reshape(found.shape[0], -1), k)[0]


def nucleus(logits: jax.Array, p: jax.Array | np.float32) -> jax.Array:
    """`[B]`: the smallest logit in the smallest set of largest ones with total probability p.

    Uses bisection between the largest logit and one that is e⁻⁶⁰ times as likely: a token belongs
    to the set if and only if the more likely ones have total probability less than p.
    """
    top = logits.max(axis=-1)
    weights = jnp.exp(logits - top[:, None])
    wanted = p * weights.sum(axis=-1)

    def above(weight):
        inside = weights >= weight[:, None]
        return jnp.where(inside, weights, 0).sum(axis=-1), inside.sum(axis=-1)

    def unsure(state):
        i, _, few, _, many = state
        return (i < 40) & (many - few > 1).any()

    def halve(state):
        i, high, few, low, many = state
        middle = jnp.sqrt(low * high)
        mass, count = above(middle)
        enough = mass >= wanted
        high, few = jnp.where(enough, high, middle), jnp.where(enough, few, count)
        low, many = jnp.where(enough, middle, low), jnp.where(enough, count, many)
        return i + 1, high, few, low, many

    none, everything = jnp.zeros(top.shape, int), jnp.full(top.shape, logits.shape[1])
    # No token is as likely as `high`; `low` includes all relevant tokens.
    high, low = jnp.full_like(top, 1.0 + 1e-6), jnp.full_like(top, 1e-26)
    low = jax.lax.while_loop(unsure, halve, (0, high, none, low, everything))[3]
    inside = jnp.where(weights >= low[:, None], logits, jnp.inf)
    return inside.min(axis=-1)


def draw(keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row from softmax(logits), with its log-probability.

    Samples a cell by the cells' weights, then a token in it by its weight. This takes two uniform
    numbers and one exponential per token; Gumbel noise would take V random numbers and two
    logarithms per token.

    Args:
      keys: `[B]`, one per row.
      logits: `[B, V]`, with at least one per row above −inf.

    Returns:
      tokens `[B]` int32 and log-probabilities `[B]`.
    """
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    top = logits.max(axis=-1)
    cells = _cells(logits)
    weights = jnp.exp(cells - top[:, None, None]).sum(axis=2)
    cell = _pick(weights, uniform[:, 0])
    inside = jnp.take_along_axis(cells, cell[:, None, None], axis=1)[:, 0]
    place = _pick(jnp.exp(inside - top[:, None]), uniform[:, 1])
    logit = jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0]
    return _token(cells, cell, place), logit - top - jnp.log(weights.sum(axis=-1))


def draw_coupled(keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `draw`, and a key gives mostly the same token for nearly the same logits.

    Of the cells' weights w the one with the largest ln w + noise is taken, then in it the token
    with the largest logit + noise. With Gumbel noise each choice follows its softmax. A key that
    is used with two distributions, TV apart in total variation, gives two tokens with probability
    at most 2 TV for the choice of the cell and 4 TV for that in it. Daliri, Musco and Suresh,
    Coupling without Communication and Drafter-Invariant Speculative Decoding, 2024, section 3.
    """
    top = logits.max(axis=-1)
    cells = _cells(logits)
    C, width = cells.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (C + width,)))(keys)
    weights = jnp.exp(cells - top[:, None, None]).sum(axis=2)
    cell = jnp.argmax(jnp.log(weights) + noise[:, :C], axis=1)
    inside = jnp.take_along_axis(cells, cell[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(inside + noise[:, C:], axis=1)
    logit = jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0]
    return _token(cells, cell, place), logit - top - jnp.log(weights.sum(axis=-1))


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token of the largest logit per row (the first on ties), with its log-probability."""
    top = logits.max(axis=-1)
    cells = _cells(logits)
    # Two steps, since XLA's argmax over a vocabulary takes ten times as long on CPUs.
    cell = jnp.argmax(cells.max(axis=2), axis=1)
    place = jnp.argmax(jnp.take_along_axis(cells, cell[:, None, None], axis=1)[:, 0], axis=1)
    return _token(cells, cell, place), -jnp.log(jnp.exp(logits - top[:, None]).sum(axis=-1))


def _cells(logits: jax.Array) -> jax.Array:
    """Splits `[B, V]` into cells `[B, C, V / C]`, padded with −inf."""
    B, V = logits.shape
    if V % CELLS:
        logits = jnp.pad(logits, ((0, 0), (0, -V % CELLS)), constant_values=BANNED)
    return logits.reshape(B, CELLS, -1)


def _token(cells: jax.Array, cell: jax.Array, place: jax.Array) -> jax.Array:
    return (cell * cells.shape[2] + place).astype(jnp.int32)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """`[B]`: index i with probability weights[i] / Σ weights, from one uniform number in [0, 1)."""
    sums = jnp.cumsum(weights, axis=-1)
    # The product rounds below the last sum, so that no index of weight 0 is picked.
    return (sums <= (uniform * sums[:, -1])[:, None]).sum(axis=-1)
