"""Short causal convolutions along documents, one kernel per channel.

Axes: B rows, T tokens, C channels, W width of the kernels.
"""

import jax
import jax.numpy as jnp

from relax import parallel


def convolve(
    x: jax.Array,
    weight: jax.Array,
    segment_ids: jax.Array | None = None,
    parent_ids: jax.Array | None = None,
) -> jax.Array:
    """y_t = Σ_j weight_(W-1-j) x_(t-j), in float32, over tokens t - j of the document of t.

    Args:
      x: `[B, T, C]`.
      weight: `[C, 1, W]`, the form of files.
      segment_ids: `[B, T]` int, whose tokens are contiguous; None: one document per row.
      parent_ids: `[B, T]` int, the segment that a token's own continues, whose last token comes
        before its first one; None: no segment has a parent.

    Returns:
      `[B, T, C]` float32.
    """
    taps = weight[:, 0].astype(jnp.float32)
    y = _scaled(x.astype(jnp.float32), taps[:, -1])
    earlier = _shifted if parent_ids is None else _gathered
    for distance, values in earlier(x, weight.shape[2], segment_ids, parent_ids):
        y += _scaled(values.astype(jnp.float32), taps[:, -1 - distance])
    return y


@jax.custom_vjp
def _scaled(x, factors):
    """x `[B, T, C]` times one factor per channel, `[C]`."""
    return x * factors[None, None, :]


def _scaled_bwd(inputs, d_y):
    x, factors = inputs
    products = (d_y * x).reshape(-1, x.shape[2])
    # A matrix product sums over tokens: XLA's own sum for CPUs walks each channel on its own.
    return _scaled(d_y, factors), (jnp.ones((1, products.shape[0])) @ products)[0]


_scaled.defvjp(lambda x, factors: (_scaled(x, factors), (x, factors)), _scaled_bwd)


def _shifted(x, width, segment_ids, parent_ids):
    """The inputs 1 to W - 1 tokens before each, 0 before the first of a document."""
    del parent_ids
    T = x.shape[1]
    for distance in range(1, min(width, T)):
        values = jnp.pad(x, ((0, 0), (distance, 0), (0, 0)))[:, :T]
        if segment_ids is not None:
            ids = jnp.pad(segment_ids, ((0, 0), (distance, 0)), constant_values=-1)[:, :T]
            values = jnp.where((ids == segment_ids)[:, :, None], values, 0)
        yield distance, values


def _gathered(x, width, segment_ids, parent_ids):
    """As `_shifted`, through the last tokens of parents."""

    def gather(x, places):
        found = jnp.take_along_axis(x, jnp.maximum(places, 0)[:, :, None], axis=1)
        return jnp.where((places >= 0)[:, :, None], found, 0)

    run = parallel.per_device(gather, (("batch",), ("batch",)), ("batch",), auto=True)
    previous = previous_places(segment_ids, parent_ids)
    places = previous
    for distance in range(1, width):
        yield distance, run(x, places)
        further = jnp.take_along_axis(previous, jnp.maximum(places, 0), axis=1)
        places = jnp.where(places >= 0, further, -1)


def previous_places(segment_ids: jax.Array, parent_ids: jax.Array) -> jax.Array:
    """`[B, T]` int32: the place in its row of the token before each; -1 before a document.

    >>> segments, parents = jnp.array([[1, 1, 2, 2, 4, 0]]), jnp.array([[0, 0, 1, 1, 1, 0]])
    >>> previous_places(segments, parents).tolist()
    [[-1, 0, 1, 2, 1, -1]]
    """
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_parent = parent_ids[:, :, None] == segment_ids[:, None, :]
    seen = is_parent & (parent_ids > 0)[:, :, None]
    last = jnp.where(seen, places[None, None, :], -1).max(axis=2)
    return jnp.where(before == segment_ids, places[None, :] - 1, last)


def last_inputs(x: jax.Array, lengths: jax.Array, width: int) -> jax.Array:
    """The last W - 1 inputs of rows of one document each, 0 before its first: `[B, C, W - 1]`.

    Args:
      x: `[B, T, C]`.
      lengths: `[B]` int, of the documents.
      width: W.
    """
    places = lengths[:, None] - (width - 1) + jnp.arange(width - 1)[None, :]
    found = jnp.take_along_axis(x, jnp.maximum(places, 0)[:, :, None], axis=1)
    return jnp.where((places >= 0)[:, :, None], found, 0).swapaxes(1, 2)


def convolve_next(x: jax.Array, weight: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convolves one new token per row.

    Args:
      x: `[B, C]`.
      weight: as in `convolve`.
      state: `[B, C, W - 1]`, the inputs before it.

    Returns:
      `[B, C]` float32, and the state with the new input.
    """
    inputs = jnp.concatenate([state, x.astype(state.dtype)[:, :, None]], axis=2)
    y = (inputs.astype(jnp.float32) * weight[None, :, 0].astype(jnp.float32)).sum(axis=2)
    return y, inputs[:, :, 1:]


def convolve_behind(
    x: jax.Array, weight: jax.Array, state: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolves several new tokens per row.

    Args:
      x: `[B, T, C]`, padded on the right.
      weight: as in `convolve`.
      state: `[B, C, W - 1]`, the inputs before them.
      real: `[B, T]` bool, false on padding.

    Returns:
      `[B * T, C]` float32, and the state behind the last real token.
    """
    before = state.shape[2]
    inputs = jnp.concatenate([state.swapaxes(1, 2), x.astype(state.dtype)], axis=1)
    y = convolve(inputs, weight)[:, before:].reshape(-1, x.shape[2])
    return y, last_inputs(inputs, real.sum(axis=1) + before, before + 1)
