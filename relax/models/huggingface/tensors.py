"""The mapping between tensors of a file and parameters.

A tensor holds one leaf, as it is or transposed, one expert of a leaf that stacks them, or several
leaves one below the other.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.models.config import TransformerConfig
from relax.models.families import Family
from relax.models.families.family import LAYER, module_of
from relax.models.transformer import Transformer


class Part(NamedTuple):
    """A leaf, or a part of it, in a tensor of a file."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # in the file
    expert: int | None = None

    @property
    def transposed(self) -> bool:
        """Whether the file holds [out, in] for our [in, out]."""
        return len(self.path) > 1 and len(self.shape) > 1


Tensors = Mapping[str, tuple[Part, ...]]


def expected_tensors(
    family: Family, config: TransformerConfig, also: Mapping[str, str] | None = None
) -> Tensors:
    """Name in the file -> what it holds, for every tensor of a model; `also`: see `Family`."""
    shapes = leaf_shapes(config)
    expected: dict[str, list[Part]] = collections.defaultdict(list)
    for path, shape in shapes.items():
        name = family.tensor_name(path, also)
        if len(path) > 1 and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "{}" in name:
            for expert in range(shape[0]):
                expected[name.format(expert)].append(Part(path, shape[1:], expert))
        else:
            expected[name].append(Part(path, shape))
    order = list(LAYER)
    for parts in expected.values():
        if len(parts) > 1:
            parts.sort(key=lambda part: order.index(module_of(part.path)))
    return {name: tuple(parts) for name, parts in expected.items()}


def leaf_shapes(config: TransformerConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of a model."""
    # Layers with the same parameters are traced once, which takes the same time for a deep model.
    experts = [layer.experts for layer in config.layers]
    kinds = sorted(set(experts))
    plain: dict[str, Any] = {
        "layer_types": (),
        "no_rope_layers": (),
        "num_hidden_layers": len(kinds),
    }
    dense = tuple(i for i, has in enumerate(kinds) if not has)
    model = Transformer(dataclasses.replace(config, **plain, dense_layers=dense))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    traced = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    layers = {f"layers_{i}": traced[f"layers_{kinds.index(has)}"] for i, has in enumerate(experts)}
    first = {"embed_tokens": traced["embed_tokens"]}
    last = {name: tree for name, tree in traced.items() if not name.startswith("layers_")}
    leaves = flax.traverse_util.flatten_dict(first | layers | last)
    return {path: leaf.shape for path, leaf in leaves.items()}


def shape_of(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """The shape of a tensor, whose parts are concatenated along the outputs."""
    first = parts[0].shape
    axis = output_axis(first)
    total = sum(part.shape[axis] for part in parts)
    return (*first[:axis], total, *first[axis + 1 :])


def to_params(expected: Tensors, tensors: Iterable[tuple[str, np.ndarray]], dtype) -> dict:
    """Parameters from the tensors of a file, which are read one after the other.

    Args:
      expected: what each holds.
      tensors: `(name, array)`, all of `expected`, in any order.
      dtype: dtype of the parameters.
    """
    waiting = collections.Counter(part.path for parts in expected.values() for part in parts)
    stacks, flat = {}, {}
    for name, array in tensors:
        for part, piece in _pieces(expected[name], array):
            if part.expert is None:
                flat[part.path] = _placed(part.path, np.ascontiguousarray(piece), dtype)
                continue
            if part.path not in stacks:
                stacks[part.path] = np.empty((waiting[part.path], *piece.shape), np.dtype(dtype))
            stacks[part.path][part.expert] = piece
            waiting[part.path] -= 1
            if not waiting[part.path]:
                flat[part.path] = _placed(part.path, stacks.pop(part.path), dtype)
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
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, output_axis(parts[0].shape))
    return np.ascontiguousarray(array, dtype)


def _pieces(parts: tuple[Part, ...], array: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    axis = output_axis(parts[0].shape)
    stops = np.cumsum([part.shape[axis] for part in parts])[:-1]
    for part, piece in zip(parts, np.split(array, stops, axis), strict=True):
        yield part, piece.swapaxes(-1, -2) if part.transposed else piece


def output_axis(shape: tuple[int, ...]) -> int:
    """The axis along which the parts of a tensor are concatenated."""
    return max(len(shape) - 2, 0)
