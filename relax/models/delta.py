"""The gated delta rule, in chunks for whole rows and token by token for decoding.

A head's state S [K, V] maps keys to values. Token t first decays it, then corrects what it holds
for the token's key:

    S_t = a_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - a_t S_{t-1}ᵀ k_t),   o_t = S_tᵀ q_t,

with a_t = exp(g_t), g_t <= 0. Yang et al., Gated Delta Networks, 2024, eq. 10; in chunks: Yang et
al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024, section 3.
All of it is computed in float32.

Documents of a row, and children behind their parents, differ from one sequence in two ways only:
which earlier tokens of a chunk come before a token (a mask in place of a triangle), and which state
its document brought into the chunk: none, that behind the last token of the chunk before, or that
behind its parent. So a chunk may hold any number of documents, and no token is computed twice.

Axes: B rows, T tokens, H heads, K entries of a key, V of a value; n chunks of C tokens, i and j
tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens
HIGHEST = jax.lax.Precision.HIGHEST  # no rounding of inputs on accelerators: states are long sums


class Documents(NamedTuple):
    """What the chunks of rows need to know of their documents."""

    before: jax.Array  # [B, n, C, C] bool: token j is token i, or before it in its document
    from_last: jax.Array  # [B, n, C] bool: its document brings the state of the chunk before
    last: jax.Array  # [B, n, C] float32: 1 at the last token, whose state goes on
    from_parent: jax.Array | None = None  # [B, n, C] bool: it brings that behind its parent
    parent: jax.Array | None = None  # [B, n, C] float32: 1 at the last token without a parent


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array | None = None,
    parent_ids: jax.Array | None = None,
    before: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over whole rows.

    Args:
      q, k: `[B, T, H, K]` float32.
      v: `[B, T, H, V]` float32.
      g: `[B, T, H]` float32, logarithms of decays, at most 0. Where g and beta are 0 the state
        stays as it is.
      beta: `[B, T, H]` float32, from 0 to 1.
      segment_ids: `[B, T]` int, whose tokens are contiguous; None: one document per row.
      parent_ids: `[B, T]` int, the segment that a token's own continues (0: none). It must be the
        nearest one before it without a parent, as in a `relax.data.forest`; None: no parents.
      before: `[B, H, K, V]` float32, the state before the first token, for rows of one document;
        None: zeros.
      chunk: C.

    Returns:
      `[B, T, H, V]`, and the state behind the last token, `[B, H, K, V]`.
    """
    B, T = g.shape[:2]
    C = min(chunk, T)
    documents = _documents(B, T, C, segment_ids, parent_ids)
    q, k, v, g, beta = (_chunks(x, C) for x in (q, k, v, g, beta))  # [B, H, n, C, ...]
    earlier = documents.before[:, None]
    total = _product("bhnij,bhnj->bhni", earlier.astype(jnp.float32), g)  # since the chunk began
    difference = jnp.where(earlier, total[..., :, None] - total[..., None, :], 0.0)
    decay = jnp.where(earlier, jnp.exp(difference), 0.0)  # [B, H, n, C, C], from token j to i
    kept = jnp.exp(total)[..., None]  # [B, H, n, C, 1], of the state that a document brought
    # u = right - left S: the corrections of a chunk solve a triangular system, for any S.
    k_beta = k * beta[..., None]
    system = _product("bhnik,bhnjk->bhnij", k_beta, k) * decay
    solved = solve_unit_lower(system, jnp.concatenate([v * beta[..., None], k_beta * kept], -1))
    right, left = jnp.split(solved, [v.shape[-1]], axis=-1)
    u, brought, state = _states(k, right, left, decay, kept, documents, before)
    scores = _product("bhnik,bhnjk->bhnij", q, k) * decay
    out = _product("bhnij,bhnjv->bhniv", scores, u)
    for chosen, before_chunk in brought:
        q_chosen = jnp.where(chosen[:, None, ..., None], q * kept, 0.0)
        out += _product("bhnik,bhnkv->bhniv", q_chosen, before_chunk)
    out = jnp.moveaxis(out, 1, 3).reshape(B, -1, *v.shape[1:2], v.shape[-1])
    return out[:, :T], state


def _states(k, right, left, decay, kept, documents: Documents, first):
    """Hands the states on from chunk to chunk, beginning with `first` `[B, H, K, V]` or zeros.

    Returns:
      The corrections u `[B, H, n, C, V]`; the states before each chunk `[B, H, n, K, V]`, each with
      the tokens `[B, n, C]` whose documents bring it; and the last state `[B, H, K, V]`.
    """
    chosen, places = [documents.from_last], [documents.last]
    if documents.parent is not None and documents.from_parent is not None:
        chosen.append(documents.from_parent)
        places.append(documents.parent)
    # Of the state behind the token at a place: what each token adds, and what stays of each source.
    keys = [_product("bni,bhnij->bhnj", place, decay)[..., None] * k for place in places]
    stays = [
        [_product("bni,bhni->bhn", place * source, kept[..., 0]) for source in chosen]
        for place in places
    ]
    lefts = [jnp.where(source[:, None, ..., None], left, 0.0) for source in chosen]
    is_there = [place.any(axis=2)[:, None] for place in places]

    def one(states, inputs):
        keys, stays, lefts, right, is_there = inputs
        u = right
        for left, state in zip(lefts, states, strict=True):
            u -= _product("bhik,bhkv->bhiv", left, state)
        new = []
        for mine, shares, there, old in zip(keys, stays, is_there, states, strict=True):
            state = _product("bhik,bhiv->bhkv", mine, u)
            for share, source in zip(shares, states, strict=True):
                state += share[..., None, None] * source
            new.append(jnp.where(there[..., None, None], state, old))
        return new, (u, states)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (keys, stays, lefts, right, is_there))
    B, H = k.shape[:2]
    empty = jnp.zeros((B, H, k.shape[-1], right.shape[-1]), jnp.float32)
    begin = [empty if first is None else first, *[empty] * (len(places) - 1)]
    last, (u, states) = jax.lax.scan(one, begin, xs)
    brought = [(who, jnp.moveaxis(x, 0, 2)) for who, x in zip(chosen, states, strict=True)]
    return jnp.moveaxis(u, 0, 2), brought, last[0]


@jax.custom_vjp
def solve_unit_lower(lower: jax.Array, right: jax.Array) -> jax.Array:
    """X in (I + L) X = R, with the strict lower triangle L of `lower` `[..., C, C]`.

    Through the inverse, which products of small blocks make: faster than substitution row by row
    on every platform, and its gradient is two more products.

    Args:
      lower: its entries from the diagonal on are not read.
      right: R, `[..., C, N]`.
    """
    return _solve(lower, right)[0]


def _solve(lower, right):
    inverse = _inverse(jnp.tril(lower, -1))
    solved = jnp.matmul(inverse, right, precision=HIGHEST)
    return solved, (inverse, solved)


def _solve_bwd(residuals, d_solved):
    inverse, solved = residuals
    d_right = jnp.matmul(inverse.mT, d_solved, precision=HIGHEST)
    return -jnp.tril(jnp.matmul(d_right, solved.mT, precision=HIGHEST), -1), d_right


solve_unit_lower.defvjp(_solve, _solve_bwd)


def _inverse(lower):
    """The inverse of I + L, for L `[..., C, C]` that is 0 from the diagonal on."""
    C = lower.shape[-1]
    if C > 8:
        half = 8 * -(-C // 16)
        a, b = _inverse(lower[..., :half, :half]), _inverse(lower[..., half:, half:])
        corner = -_chain(b, lower[..., half:, :half], a)
        top = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, C - half)])
        return jnp.concatenate([top, jnp.concatenate([corner, b], axis=-1)], axis=-2)
    # L⁸ = 0, so that (I + L)⁻¹ = (I - L) (I + L²) (I + L⁴).
    eye = jnp.broadcast_to(jnp.eye(C, dtype=lower.dtype), lower.shape)
    square = _chain(lower, lower)
    return _chain(eye - lower, eye + square, eye + _chain(square, square))


def _chain(first, *others):
    for other in others:
        first = jnp.matmul(first, other, precision=HIGHEST)
    return first


def _documents(B, T, C, segment_ids, parent_ids) -> Documents:
    n = -(-T // C)
    last = jnp.broadcast_to((jnp.arange(C) == C - 1).astype(jnp.float32), (B, n, C))
    lower = jnp.broadcast_to(jnp.tril(jnp.ones((C, C), bool)), (B, n, C, C))
    if segment_ids is None:
        return Documents(lower, jnp.ones((B, n, C), bool), last)

    def cut(ids):  # the tokens that fill up the last chunk belong to the last document
        return jnp.pad(ids, ((0, 0), (0, n * C - T)), mode="edge").reshape(B, n, C)

    segments = cut(segment_ids)
    of_last = jnp.pad(segments[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)), constant_values=-1)
    same, from_last = segments[..., :, None] == segments[..., None, :], segments == of_last
    if parent_ids is None:
        return Documents(same & lower, from_last, last)
    parents = cut(parent_ids)
    is_child = parents > 0
    same |= is_child[..., None] & (parents[..., :, None] == segments[..., None, :])
    from_last |= is_child & (parents == of_last)
    places = jnp.broadcast_to(jnp.arange(n * C).reshape(n, C), (B, n, C))
    latest = jax.lax.cummax(jnp.where(is_child, -1, places).reshape(B, -1), axis=1)
    ends = latest.reshape(B, n, C)[:, :, -1:]
    # The last token without a parent, where this chunk has one.
    parent = (places == ends).astype(jnp.float32)
    ends = jnp.pad(ends[:, :-1, 0], ((0, 0), (1, 0)), constant_values=-1)
    of_parent = jnp.take_along_axis(segments.reshape(B, -1), jnp.maximum(ends, 0), axis=1)
    of_parent = jnp.where(ends >= 0, of_parent, -1)[:, :, None]
    from_parent = is_child & (parents == of_parent) & ~from_last
    return Documents(same & lower, from_last, last, from_parent, parent)


def _chunks(x, C):
    """`[B, T, H, ...]` -> `[B, H, n, C, ...]`, filled up with zeros."""
    B, T, H = x.shape[:3]
    x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 3, 1)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, precision=HIGHEST)


def delta_step(q, k, v, g, beta, state) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule for one new token per row.

    Args:
      q, k, v, g, beta: as in `delta_rule`, without the axis T.
      state: `[B, H, K, V]` float32.

    Returns:
      `[B, H, V]`, and the new state.
    """
    state = state * jnp.exp(g)[..., None, None]
    u = beta[..., None] * (v - _product("bhk,bhkv->bhv", k, state))
    state = state + k[..., :, None] * u[..., None, :]
    return _product("bhk,bhkv->bhv", q, state), state
