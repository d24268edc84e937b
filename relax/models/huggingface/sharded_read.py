"""Reading of weights onto a mesh: each process reads only the parts of its devices.

No weight is ever whole on a host.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np

from relax import parallel
from relax.models.huggingface.shards import finite, open_tensors, read_tensors
from relax.models.huggingface.tensors import Part, Tensors, output_axis, to_params

Bounds = tuple[tuple[int, int], ...]  # start and stop in every dimension
Read = Callable[[str, Bounds], np.ndarray]


def read_params(directory: Path, expected: Tensors, files: Mapping[str, str], dtype) -> dict:
    """All parameters of a model.

    Args:
      directory: the model's directory.
      expected: what each tensor holds; all of them are there.
      files: tensor name -> file.
      dtype: dtype of the parameters.
    """
    if parallel.layout() is None:
        return to_params(expected, read_tensors(directory, expected, files), dtype)
    sources = collections.defaultdict(list)
    for name, parts in expected.items():
        start, axis = 0, output_axis(parts[0].shape)
        for part in parts:
            sources[part.path].append((name, part, start))
            start += part.shape[axis]
    flat = {}
    with _slices(directory, files) as read:
        for path, found in sources.items():
            found.sort(key=lambda source: source[1].expert or 0)
            shape = _leaf_shape(found)
            where = parallel.sharding_of("/".join(path), shape)
            assert where is not None, "a mesh is in use"
            piece = functools.lru_cache(functools.partial(_piece, read, found, dtype))

            def of_index(index, piece=piece, shape=shape):
                return piece(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

            flat[path] = jax.make_array_from_callback(shape, where, of_index)
    return flax.traverse_util.unflatten_dict(flat)


def _leaf_shape(found: list[tuple[str, Part, int]]) -> tuple[int, ...]:
    part = found[0][1]
    shape = (*part.shape[:-2], *part.shape[:-3:-1]) if part.transposed else part.shape
    return shape if part.expert is None else (len(found), *shape)


def _piece(read: Read, found: list[tuple[str, Part, int]], dtype, bounds: Bounds) -> np.ndarray:
    """Reads a part of a leaf from the tensors that hold it."""
    if found[0][1].expert is None:
        return _of_tensor(read, *found[0], bounds).astype(dtype)
    first, *rest = bounds
    return np.stack([_of_tensor(read, *f, rest) for f in found[slice(*first)]]).astype(dtype)


def _of_tensor(read: Read, name: str, part: Part, start: int, bounds) -> np.ndarray:
    bounds = list(bounds)
    if part.transposed:
        bounds[-2:] = bounds[:-3:-1]
    axis = output_axis(part.shape)
    bounds[axis] = tuple(start + bound for bound in bounds[axis])
    array = read(name, tuple(bounds))
    return array.swapaxes(-1, -2) if part.transposed else array


@contextlib.contextmanager
def _slices(directory: Path, files: Mapping[str, str]) -> Iterator[Read]:
    """Reads parts of tensors; a file is opened once."""
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda file: stack.enter_context(open_tensors(directory, file)))

        def read(name: str, bounds: Bounds) -> np.ndarray:
            part = opened(files[name]).get_slice(name)[tuple(slice(*b) for b in bounds)]
            return finite(directory / files[name], name, part)

        yield read
