"""The mapping between tensors of a file and parameters.

A tensor holds one leaf, as it is or transposed, one expert of a leaf that stacks them, or several
leaves, the outputs of one below those of the other, or in turns.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.models.config import TransformerConfig
from relax.models.families import Family
from relax.models.families.family import LAYER, module_of
from relax.models.quantization import is_linear
from relax.models.transformer import Transformer


class Part(NamedTuple):
    """A leaf, or a part of it, in a tensor of a file.

    Attributes:
      path: of the leaf.
      shape: in the file.
      transposed: whether the file holds [out, in] for our [in, out].
      expert: the index of the expert that the tensor holds; None: it holds all of the leaf.
      step: how far apart the outputs lie in the tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None
    step: int = 1

    @property
    def axis(self) -> int:
        """That of the outputs, along which parts share a tensor."""
        return len(self.shape) - (2 if self.transposed else 1)


def _is_transposed(family: Family, path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a matrix, or a stack of some; kernels of convolutions are as in files."""
    matrix = len(path) > 1 and len(shape) > 1 and not path[-1].endswith(("weight", "bias"))
    return matrix and module_of(path) not in family.untransposed


Tensors = Mapping[str, tuple[Part, ...]]


def expected_tensors(
    family: Family, config: TransformerConfig, also: Mapping[str, str] | None = None
) -> Tensors:
    """Name in the file -> what it holds, for every tensor of a model; `also`: see `Family`."""
    shapes = leaf_shapes(config)
    expected: dict[str, list[Part]] = collections.defaultdict(list)
    for path, shape in shapes.items():
        name = family.tensor_name(path, also)
        transposed = _is_transposed(family, path, shape)
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "{}" in name:
            for expert in range(shape[0]):
                expected[name.format(expert)].append(Part(path, shape[1:], transposed, expert))
        else:
            expected[name].append(Part(path, shape, transposed))
    order = list(LAYER)
    for parts in expected.values():
        if len(parts) > 1:
            parts.sort(key=lambda part: order.index(module_of(part.path)))
            if family.alternating:
                parts[:] = [part._replace(step=len(parts)) for part in parts]
    return {name: tuple(parts) for name, parts in expected.items()}


def leaf_shapes(config: TransformerConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of a model."""
    # Layers with the same parameters are traced once, which takes the same time for a deep model.
    plain: dict[str, Any] = {"window": None, "rope": None, "source": None}
    kinds = [(dataclasses.replace(spec, **plain), spec.source is None) for spec in config.layers]
    first_of = {kind: kinds.index(kind) for kind in kinds}
    sources = {config.layers[i].source for i in first_of.values()}
    init = functools.partial(
        Transformer(config).init, layers={*first_of.values(), *sources}, method="outline"
    )
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    traced = jax.eval_shape(init, jax.random.key(0), ids)["params"]
    layers = {f"layers_{i}": traced[f"layers_{first_of[kind]}"] for i, kind in enumerate(kinds)}
    first = {"embed_tokens": traced["embed_tokens"]}
    last = {name: tree for name, tree in traced.items() if not name.startswith("layers_")}
    leaves = flax.traverse_util.flatten_dict(first | layers | last)
    return {path: leaf.shape for path, leaf in leaves.items()}


def shape_of(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """The shape of a tensor, whose parts share the outputs."""
    if len(parts) == 1:
        return parts[0].shape
    first, axis = parts[0].shape, parts[0].axis
    total = sum(part.shape[axis] for part in parts)
    return (*first[:axis], total, *first[axis + 1 :])


def outputs_of(parts: tuple[Part, ...]) -> list[slice]:
    """Where the outputs of each part are in their tensor."""
    if len(parts) == 1:
        return [slice(0, None)]
    return places([part.shape[part.axis] for part in parts], parts[0].step > 1)


def places(widths: Sequence[int], alternating: bool) -> list[slice]:
    """Where the outputs of leaves with as many outputs are in the tensor that they share.

    >>> places([3, 2], False), places([2, 2], True)
    ([slice(0, 3, None), slice(3, 5, None)], [slice(0, None, 2), slice(1, None, 2)])
    """
    if alternating:
        return [slice(i, None, len(widths)) for i in range(len(widths))]
    stops = itertools.accumulate(widths)
    return [slice(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]


def to_params(
    expected: Tensors, tensors: Iterable[tuple[str, np.ndarray]], dtype, quantize=None
) -> dict:
    """Parameters from the tensors of a file, which are read one after the other.

    Args:
      expected: what each holds.
      tensors: `(name, array)`, all of `expected`, in any order.
      dtype: dtype of the parameters.
      quantize: see `relax.models.huggingface.sharded_read.read_params`.
    """

    def placed(path: tuple[str, ...], array: np.ndarray):
        if quantize is not None and is_linear(path):
            return quantize(path, array)
        return _placed(path, array, dtype)

    waiting = collections.Counter(part.path for parts in expected.values() for part in parts)
    stacks, flat = {}, {}
    for name, array in tensors:
        for part, piece in _pieces(expected[name], array):
            if part.expert is None:
                flat[part.path] = placed(part.path, np.asarray(piece, order="C"))
                continue
            if part.path not in stacks:
                stacks[part.path] = np.empty((waiting[part.path], *piece.shape), np.dtype(dtype))
            stacks[part.path][part.expert] = piece
            waiting[part.path] -= 1
            if not waiting[part.path]:
                flat[part.path] = placed(part.path, stacks.pop(part.path))
    return flax.traverse_util.unflatten_dict(flat)


def _placed(path: tuple[str, ...], array: np.ndarray, dtype):
    where = parallel.sharding_of("/".join(path), array.shape)
    if where is None:
        return jnp.asarray(array, dtype)
    return parallel.device_put(array.astype(dtype), where)


def from_params(parts: tuple[Part, ...], flat: Mapping, dtype: np.dtype) -> np.ndarray:
    """The tensor of a file, from flattened parameters."""
    pieces = []
    for part in parts:
        leaf = flat[part.path]
        piece = parallel.to_host(leaf if part.expert is None else leaf[part.expert])
        pieces.append(piece.swapaxes(-1, -2) if part.transposed else piece)
    if len(pieces) == 1:
        return np.asarray(pieces[0], dtype, order="C")
    array = np.empty(shape_of(parts), dtype)
    for place, piece in zip(outputs_of(parts), pieces, strict=True):
        np.moveaxis(array, parts[0].axis, 0)[place] = np.moveaxis(piece, parts[0].axis, 0)
    return array


def _pieces(parts: tuple[Part, ...], array: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    for part, place in zip(parts, outputs_of(parts), strict=True):
        piece = array if len(parts) == 1 else array[(slice(None),) * part.axis + (place,)]
        yield part, piece.swapaxes(-1, -2) if part.transposed else piece
