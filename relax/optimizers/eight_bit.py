"""Adam's moments in 8 bits, in blocks with a scale each.

    m ≈ s · (c / 127)³     c from -127 to 127
    v ≈ s · (c / 255)⁶     c from 0 to 255

s is the largest magnitude of a block of at most 256 numbers. Codes lie denser where numbers are
small: a block holds √v from 1 down to 6e-8 of its largest. m is rounded to the nearest code. Of the
two neighbours of v one is taken at random, so that the stored number is right on average: rounded
to the nearest, a v that an update changes by a thousandth would hardly ever change. A v above 0 is
never stored as 0, since m / √v would explode.

Moments in 8 bits by blocks: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022,
https://arxiv.org/abs/2110.02861, whose codes are those of a table, rounded to the nearest.
"""

import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from relax.optimizers.stochastic_rounding import noise

BLOCK, LEAST_BLOCK = 256, 64
LEAST_SIZE = 4096  # arrays with fewer numbers keep float32 moments, as in bitsandbytes


@flax.struct.dataclass
class EightBit:
    """A moment of an array.

    Attributes:
      codes: int8 (m) or uint8 (v), of the array's shape.
      scales: float32, of that shape with the number of blocks in place of the cut axis.
      axis: the cut axis.
    """

    codes: jax.Array
    scales: jax.Array
    axis: int = flax.struct.field(pytree_node=False)


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`.

    Attributes:
      count: int32 scalar, updates made.
      mu, nu: an `EightBit` for each array, or an array of float32 for a small one.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count; checkpoints hold the name
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam_8bit(b1=0.9, b2=0.999, eps=1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that stores its moments in 8 bits; it computes in float32.

    Arrays of less than 4,096 numbers, and those whose axes have no divisor from 64 to 256, keep
    moments of float32.
    """

    def init(params):
        def zeros(param, dtype):
            cut = block_of(param.shape)
            if cut is None:
                return jnp.zeros(param.shape, jnp.float32)
            axis, size = cut
            scales = [n // size if i == axis else n for i, n in enumerate(param.shape)]
            return EightBit(jnp.zeros(param.shape, dtype), jnp.zeros(scales, jnp.float32), axis)

        mu, nu = (jax.tree.map(lambda p, d=d: zeros(p, d), params) for d in (jnp.int8, jnp.uint8))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        key = jax.random.fold_in(jax.random.key(0), state.count)
        gradients, tree = jax.tree.flatten(updates)
        moments = zip(*(_moments(moment) for moment in (state.mu, state.nu)), strict=True)
        steps, mus, nus = [], [], []
        for number, (g, (mu, nu)) in enumerate(zip(gradients, moments, strict=True)):
            m = b1 * stored(mu) + (1 - b1) * g
            v = b2 * stored(nu) + (1 - b2) * jnp.square(g)
            corrected = jnp.sqrt(v / (1 - b2**count))
            steps.append(m / (1 - b1**count) / (corrected + eps))
            if isinstance(mu, EightBit):
                bits = noise(g.shape, jax.random.fold_in(key, number))
                m, v = _first(m, mu.axis), _second(v, mu.axis, bits)
            mus.append(m)
            nus.append(v)
        steps, mus, nus = (jax.tree.unflatten(tree, leaves) for leaves in (steps, mus, nus))
        return steps, Adam8bitState(count, mus, nus)

    return optax.GradientTransformation(init, update)


def _moments(tree) -> list:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, EightBit))


def block_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis that is cut and the size of its blocks; None: the moments stay in float32.

    The longer one of the last two axes, or else the other, by its largest divisor up to 256.

    >>> block_of((576, 1536)), block_of((8192, 16)), block_of((16, 64)), block_of((4097, 3))
    ((1, 256), (0, 256), None, (0, 241))
    """
    axes = range(max(len(shape) - 2, 0), len(shape))
    if math.prod(shape) < LEAST_SIZE:
        return None
    for axis in sorted(axes, key=lambda axis: -shape[axis]):
        divisors = range(min(BLOCK, shape[axis]), LEAST_BLOCK - 1, -1)
        if size := next((n for n in divisors if shape[axis] % n == 0), None):
            return axis, size
    return None


def stored(moment) -> jax.Array:
    """The float32 numbers of a moment, in 8 bits or not."""
    if not isinstance(moment, EightBit):
        return moment
    codes, is_first = moment.codes.astype(jnp.float32), moment.codes.dtype == jnp.int8
    shares = _cube(codes / 127) if is_first else jnp.square(_cube(codes / 255))
    return _times(shares, moment.scales, moment.axis)


def _first(m: jax.Array, axis: int) -> EightBit:
    scales = _largest(m, axis)
    shares = jnp.abs(_times(m, _inverse(scales), axis))
    low = jnp.floor(jnp.cbrt(shares) * 127)
    below, above = _cube(low / 127), _cube((low + 1) / 127)
    codes = jnp.minimum(low + (shares - below > above - shares), 127) * jnp.sign(m)
    return EightBit(codes.astype(jnp.int8), scales, axis)


def _second(v: jax.Array, axis: int, bits: jax.Array) -> EightBit:
    scales = _largest(v, axis)
    shares = _times(v, _inverse(scales), axis)
    low = jnp.floor(jnp.cbrt(jnp.sqrt(shares)) * 255)
    below, above = (jnp.square(_cube(c / 255)) for c in (low, low + 1))
    up = (shares - below) / (above - below) > _uniform(bits)
    codes = jnp.clip(low + up, (v > 0).astype(jnp.float32), 255)
    return EightBit(codes.astype(jnp.uint8), scales, axis)


def _cube(x: jax.Array) -> jax.Array:
    return x * x * x


def _uniform(bits: jax.Array) -> jax.Array:
    """In (0, 1), of random bits."""
    return ((bits >> 8).astype(jnp.float32) + 0.5) / 2**24


def _inverse(scales: jax.Array) -> jax.Array:
    return 1.0 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)


def _largest(x: jax.Array, axis: int) -> jax.Array:
    size = block_of(x.shape)
    assert size is not None  # it has been cut
    return jnp.abs(_cut(x, axis, x.shape[axis] // size[1])).max(axis=axis + 1)


def _times(x: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """x times the scale of its block."""
    cut = _cut(x, axis, scales.shape[axis])
    return (cut * jnp.expand_dims(scales, axis + 1)).reshape(x.shape)


def _cut(x: jax.Array, axis: int, count: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
