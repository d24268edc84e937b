"""Reading of weights onto a mesh: each process reads only the parts of its devices.

No weight is ever whole on a host.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np

from relax import parallel
from relax.models.huggingface import mxfp4
from relax.models.huggingface.shards import finite, open_tensors, read_tensors
from relax.models.huggingface.tensors import Part, Tensors, outputs_of, to_params
from relax.models.quantization import is_linear

Bounds = tuple[tuple[int, int], ...]  # start and stop in every dimension
Read = Callable[[str, Bounds], np.ndarray]


class Leaf(NamedTuple):
    """A leaf of the parameters, as the files hold it.

    Attributes:
      shape: of the whole leaf.
      read: gives the entries within some bounds.
    """

    shape: tuple[int, ...]
    read: Callable[[Bounds], np.ndarray]


def read_params(
    directory: Path, expected: Tensors, files: Mapping[str, str], dtype, quantize=None
) -> dict:
    """All parameters of a model.

    Args:
      directory: the model's directory.
      expected: what each tensor holds; all of them are there.
      files: tensor name -> file.
      dtype: dtype of the parameters.
      quantize: a `relax.models.huggingface.quantized.BaseQuantizer` for the linear layers.
    """
    if quantize is not None:
        quantize.origin = directory, expected, files, dtype
    if parallel.layout() is None:
        return to_params(expected, read_tensors(directory, expected, files), dtype, quantize)
    flat: dict = {}
    with slices(directory, files) as read:
        for path, (shape, read_leaf) in leaf_sources(expected).items():
            piece = functools.lru_cache(functools.partial(read_leaf, read, dtype))
            if quantize is not None and is_linear(path):
                flat[path] = quantize.on_mesh(
                    path, Leaf(shape, functools.partial(read_leaf, read, dtype))
                )
                continue
            where = parallel.sharding_of("/".join(path), shape)
            assert where is not None, "a mesh is in use"

            def of_index(index, piece=piece, shape=shape):
                return piece(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

            flat[path] = jax.make_array_from_callback(shape, where, of_index)
    return flax.traverse_util.unflatten_dict(flat)


def leaf_sources(expected: Tensors) -> dict[tuple[str, ...], tuple[tuple[int, ...], Callable]]:
    """Path -> shape of a leaf, and a function `(read, dtype, bounds)` that reads a part of it."""
    sources = collections.defaultdict(list)
    for name, parts in expected.items():
        for part, place in zip(parts, outputs_of(parts), strict=True):
            sources[part.path].append((name, part, place.start))
    for found in sources.values():
        found.sort(key=lambda source: source[1].expert or 0)
    return {
        path: (_leaf_shape(found), functools.partial(_piece, found))
        for path, found in sources.items()
    }


def _leaf_shape(found: list[tuple[str, Part, int]]) -> tuple[int, ...]:
    part = found[0][1]
    shape = (*part.shape[:-2], *part.shape[:-3:-1]) if part.transposed else part.shape
    return shape if part.expert is None else (len(found), *shape)


def _piece(found: list[tuple[str, Part, int]], read: Read, dtype, bounds: Bounds) -> np.ndarray:
    """Reads a part of a leaf from the tensors that hold it."""
    if found[0][1].expert is None:
        return _of_tensor(read, *found[0], bounds).astype(dtype)
    first, *rest = bounds
    return np.stack([_of_tensor(read, *f, rest) for f in found[slice(*first)]]).astype(dtype)


def _of_tensor(read: Read, name: str, part: Part, start: int, bounds) -> np.ndarray:
    if not bounds:
        return read(name, ())
    bounds = list(bounds)
    if part.transposed:
        bounds[-2:] = bounds[:-3:-1]
    first, last = bounds[part.axis]
    # From its first output to its last; those between them may be another part's.
    bounds[part.axis] = (start + part.step * first, start + part.step * (last - 1) + 1)
    array = read(name, tuple(bounds))[(slice(None),) * part.axis + (slice(None, None, part.step),)]
    return array.swapaxes(-1, -2) if part.transposed else array


@contextlib.contextmanager
def slices(directory: Path, files: Mapping[str, str]) -> Iterator[Read]:
    """Reads parts of tensors; a file is opened once."""
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda file: stack.enter_context(open_tensors(directory, file)))

        def stored(name: str, bounds: Bounds) -> np.ndarray:
            file, index = opened(files[name]), tuple(slice(*bound) for bound in bounds)
            part: np.ndarray = file.get_slice(name)[index] if index else file.get_tensor(name)
            return part

        def read(name: str, bounds: Bounds) -> np.ndarray:
            if mxfp4.is_packed(name, files):
                part, file = mxfp4.unpack_part(stored, name, bounds), files[name + mxfp4.BLOCKS]
            else:
                part, file = stored(name, bounds), files[name]
            return finite(directory / file, name, part)

        yield read
