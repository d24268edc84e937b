"""Matrices of weights in 4 or 8 bits, in blocks with a scale each.

    W ≈ s · table[code]        nf4: 16 numbers between -1 and 1, quantiles of a normal distribution
    W ≈ s · code / 127         int8

A block is 64 entries of one output, s the largest magnitude in it. `Quantized` stands in the place
of a kernel `[D, F]` or of experts `[E, D, F]`, and is read-only: `relax.models.layers.matmul` gives
no gradient for it, and makes it a matrix again, where it is used, in the forward and once more in
the backward pass. bitsandbytes has the same blocks and codes wherever 64 divides D.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, https://arxiv.org/abs/2305.14314,
section 3 and appendix E (the numbers).

Axes: E experts, D inputs, F outputs, N blocks of an output.
"""

import functools
import math

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel

BLOCK = 64
KINDS = ("nf4", "int8")
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on

Path = tuple[str, ...]


@flax.struct.dataclass
class Quantized:
    """A quantised matrix `[D, F]`, or a stack of some `[E, D, F]`.

    Attributes:
      codes: int8 `[..., 64 N, F]`; or for nf4 uint8 `[..., 32 N, F]`, of which a byte holds the
        entries i (low bits) and i + 32 of its block.
      scales: float32 `[..., N, F]`.
      padding: rows of the last block that the matrix does not have.
    """

    codes: jax.Array
    scales: jax.Array
    padding: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        *E, N, F = self.scales.shape
        return (*E, BLOCK * N - self.padding, F)

    @property
    def size(self) -> int:
        """The number of entries of the matrix."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return self.scales.ndim


def is_quantized(leaf) -> bool:
    """Whether a leaf of parameters is a `Quantized`, for `jax.tree.map(..., is_leaf=...)`."""
    return isinstance(leaf, Quantized)


def is_linear(path: Path) -> bool:
    """Whether the leaf at a path is the matrix of a linear layer of a block, or of experts.

    >>> is_linear(("layers_0", "q_proj", "kernel")), is_linear(("layers_0", "experts", "router"))
    (True, False)
    """
    return path[0].startswith("layers_") and (
        path[-1] == "kernel" or (path[-2] == "experts" and path[-1] in _EXPERTS)
    )


_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@functools.partial(jax.jit, static_argnames="kind")
def quantize(matrix: jax.Array, kind: str) -> Quantized:
    """Rounds every entry to the nearest number of its block.

    Args:
      matrix: `[..., D, F]`.
      kind: `nf4` or `int8`.
    """
    *E, D, F = matrix.shape
    N = -(-D // BLOCK)
    padding = N * BLOCK - D
    blocks = jnp.pad(matrix.astype(jnp.float32), [(0, 0)] * len(E) + [(0, padding), (0, 0)])
    blocks = blocks.reshape(*E, N, BLOCK, F)
    scales = jnp.abs(blocks).max(axis=-2)
    shares = blocks * (1.0 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))[..., None, :]
    if kind == "int8":
        codes = jnp.round(shares * 127).astype(jnp.int8)
    else:
        levels = np.asarray(NF4, np.float32)
        between = (levels[1:] + levels[:-1]) / 2
        found = sum((shares > float(b)).astype(jnp.uint8) for b in between)
        low, high = jnp.split(jnp.asarray(found), 2, axis=-2)
        codes = low | (high << 4)
    return Quantized(codes.reshape(*E, -1, F), scales, padding)


def dequantize(weight: Quantized, dtype=jnp.float32) -> jax.Array:
    """The matrix `[..., D, F]` of a `Quantized`: computed in float32, then rounded to `dtype`."""
    *E, N, F = weight.scales.shape
    codes = weight.codes.reshape(*E, N, -1, F)
    if codes.dtype == jnp.int8:
        shares = codes.astype(jnp.float32) * jnp.float32(1 / 127)
    else:
        shares = _nf4(jnp.concatenate([codes & 15, codes >> 4], axis=-2))
    whole = (shares * weight.scales[..., None, :]).astype(dtype).reshape(*E, N * BLOCK, F)
    return whole[..., : N * BLOCK - weight.padding, :]


def _nf4(codes: jax.Array) -> jax.Array:
    """The numbers of codes below 16: chosen bit by bit, since tables are slow on accelerators.

    On CPUs a table is as fast, and a program with one compiles in two thirds of the time.
    """
    if parallel.platform() == "cpu":
        return jnp.asarray(NF4, jnp.float32).at[codes].get(mode="promise_in_bounds")
    values: list = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = ((codes >> bit) & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]


def plain(leaf, dtype=jnp.float32):
    """The array of a leaf that may be quantised."""
    return dequantize(leaf, dtype) if is_quantized(leaf) else leaf


def quantize_linear(params, kind: str):
    """Parameters with the matrices of linear layers quantised; what is a shape stays one."""
    flat = flax.traverse_util.flatten_dict(params)
    flat = {p: quantize(leaf, kind) if is_linear(p) else leaf for p, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(flat)


@jax.jit
def squared_error(matrix: jax.Array, weight: Quantized) -> tuple[jax.Array, jax.Array]:
    """‖W − Q(W)‖² and ‖W‖², float32."""
    matrix = matrix.astype(jnp.float32)
    return jnp.square(matrix - dequantize(weight)).sum(), jnp.square(matrix).sum()
