"""Experts in MXFP4, four bits per number, as in the files of gpt-oss; they are read as bfloat16.

A weight `[E, in, out]` is two tensors there: `_blocks` `[E, out, in / 32, 16]` of two numbers per
byte, the lower half first, and `_scales` `[E, out, in / 32]`, the exponent of each 32 of them plus
127. bfloat16 holds every such number exactly.
Open Compute Project, OCP Microscaling Formats (MX) Specification 1.0, 2023, section 5.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
SIZE = 32  # numbers with one scale
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by their three lower bits; the fourth: sign
_NUMBERS = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=-1)  # [byte, 2]
_POWERS = np.ldexp(np.float32(1.0), np.arange(255) - 127)
_SCALES = np.array([*_POWERS, np.nan], np.float32)  # by the byte of a scale

Bounds = tuple[tuple[int, int], ...]  # start and stop in every dimension


def is_packed(name: str, files: Mapping[str, object]) -> bool:
    """Whether a tensor is in the files as blocks and scales."""
    return name not in files and name + BLOCKS in files and name + SCALES in files


def packed_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors in the files of one of `shape` `[E, in, out]`, and their shapes.

    >>> packed_shapes("w", (2, 64, 5))
    {'w_blocks': (2, 5, 2, 16), 'w_scales': (2, 5, 2)}
    """
    E, D, F = shape
    scales = (E, F, -(-D // SIZE))
    return {name + BLOCKS: (*scales, SIZE // 2), name + SCALES: scales}


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers `[E, in, out]` bfloat16 of `blocks` and `scales`; some may be infinite or NaN."""
    out = np.empty((*blocks.shape[:2], blocks.shape[2] * SIZE), jnp.bfloat16)
    for expert, (block, exponents) in enumerate(zip(blocks, scales, strict=True)):
        pairs = _PAIRS[block].reshape(*exponents.shape, SIZE)
        with np.errstate(over="ignore"):
            numbers = pairs * _SCALES[exponents][..., None]
        out[expert] = numbers.reshape(out.shape[1:])
    return out.swapaxes(1, 2)


def unpack_part(read: Callable[[str, Bounds], np.ndarray], name: str, bounds: Bounds) -> np.ndarray:
    """A part of a weight, of which no more is read than the blocks that it touches.

    Args:
      read: gives a part of a tensor of the files.
      name: of the weight.
      bounds: of its three dimensions.
    """
    experts, (first, last), outputs = bounds
    groups = (first // SIZE, -(-last // SIZE))
    scales = read(name + SCALES, (experts, outputs, groups))
    blocks = read(name + BLOCKS, (experts, outputs, groups, (0, SIZE // 2)))
    skipped = groups[0] * SIZE
    return unpack(blocks, scales)[:, first - skipped : last - skipped]
