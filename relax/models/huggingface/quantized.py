"""Reading of a base whose linear layers are quantised, one matrix after the other.

The weights of a file are never all there in float. What is merged later, an adapter, is merged into
the numbers of the file, which `original_weights` reads again, one matrix at a time.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.config.text import format_bytes
from relax.models.huggingface.sharded_read import Bounds, Leaf, leaf_sources, slices
from relax.models.huggingface.tensors import Tensors
from relax.models.quantization import (
    BLOCK,
    Quantized,
    is_quantized,
    quantize,
    squared_error,
)
from relax.models.quantization import Path as Weight


class BaseQuantizer:
    """Quantises the linear layers of a model that is being read.

    Args:
      kind: of `relax.models.quantization.KINDS`.

    Attributes:
      errors: path -> ‖W − Q(W)‖² and ‖W‖² of the parts that this process read.
      origin: directory, tensors, files and dtype that were read.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.errors: dict[Weight, np.ndarray] = {}
        self.origin: tuple[Path, Tensors, Mapping[str, str], Any] | None = None
        self.bytes = 0

    def __call__(self, path: Weight, matrix) -> Quantized:
        """The quantised matrix, and a note of its rounding error."""
        matrix = jnp.asarray(matrix)
        found = quantize(matrix, self.kind)
        self.errors[path] = self.errors.get(path, 0) + np.asarray(squared_error(matrix, found))
        self.bytes += found.codes.nbytes + found.scales.nbytes
        return jax.block_until_ready(found)

    def on_mesh(self, path: Weight, leaf: Leaf) -> Quantized:
        """A leaf on the mesh, of which each process reads and quantises the parts it holds."""
        *E, D, F = leaf.shape
        N = -(-D // BLOCK)
        rows = BLOCK // 2 if self.kind == "nf4" else BLOCK  # of codes in a block

        @functools.cache
        def blocks(bounds: Bounds) -> Quantized:
            *experts, (first, last), outputs = bounds
            part = leaf.read((*experts, (first * BLOCK, min(last * BLOCK, D)), outputs))
            return jax.tree.map(np.asarray, self(path, part))

        def placed(name: str, shape: tuple[int, ...], per_block: int) -> jax.Array:
            def of_index(index) -> np.ndarray:
                *experts, (first, last), outputs = (
                    s.indices(n)[:2] for s, n in zip(index, shape, strict=True)
                )
                start, stop = first // per_block, -(-last // per_block)
                found = getattr(blocks((*experts, (start, stop), outputs)), name)
                return found[..., first - start * per_block : last - start * per_block, :]

            where = parallel.sharding_of("/".join((*path, name)), shape)
            assert where is not None, "a mesh is in use"
            return jax.make_array_from_callback(shape, where, of_index)

        codes = placed("codes", (*E, N * rows, F), rows)
        return Quantized(codes, placed("scales", (*E, N, F), 1), N * BLOCK - D)

    def report(self) -> str:
        """One line: how many weights, their bytes, and the rounding error of layers."""
        layers: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
        for path, sums in self.errors.items():
            layers[path[0]] = layers[path[0]] + sums
        shares = {name: float(np.sqrt(e / max(w, 1e-30))) for name, (e, w) in layers.items()}
        best, worst = (pick(shares, key=lambda name: shares[name]) for pick in (min, max))
        return (
            f"{self.kind}: {len(self.errors)} matrices quantised to {format_bytes(self.bytes)}; "
            f"‖W − Q(W)‖ / ‖W‖ per layer from {shares[best]:.3g} ({best}) to {shares[worst]:.3g} "
            f"({worst})"
        )


@dataclasses.dataclass(frozen=True)
class OriginalWeight:
    """A weight in its file, read when it becomes an array; with an adapter, merged into it.

    Attributes:
      shape, dtype: of the array.
      read: gives the entries within some bounds.
      merge: `(matrix, expert) -> matrix`; None: no adapter.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Bounds], np.ndarray]
    merge: Callable | None = None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = self.read(tuple((0, n) for n in self.shape))
        whole = whole if self.merge is None else parallel.to_host(self.merge(whole, ...))
        return np.asarray(whole, dtype)

    def __getitem__(self, expert: int) -> np.ndarray:
        bounds = ((expert, expert + 1), *((0, n) for n in self.shape[1:]))
        one = self.read(bounds)[0]
        return one if self.merge is None else parallel.to_host(self.merge(one, expert))


def original_weights(params, quantizer: BaseQuantizer) -> dict:
    """Parameters with the weights of the file in place of the quantised ones."""
    assert quantizer.origin is not None  # it has read something
    directory, expected, files, dtype = quantizer.origin
    leaves = leaf_sources(expected)
    flat = flax.traverse_util.flatten_dict(params)
    for path in [path for path, leaf in flat.items() if is_quantized(leaf)]:
        shape, read = leaves[path]

        def of_bounds(bounds: Bounds, read=read) -> np.ndarray:
            with slices(directory, files) as tensors:
                return read(tensors, dtype, bounds)

        flat[path] = OriginalWeight(shape, np.dtype(dtype), of_bounds)
    return flax.traverse_util.unflatten_dict(flat)
