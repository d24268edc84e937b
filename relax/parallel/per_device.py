"""Functions that every device runs on its own part, where rows and heads do not mix.

XLA cuts matrix products along any axis by itself. What it cannot see through (a kernel, a sort of
tokens, a product over merged axes) runs so.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec as P

from relax.parallel.mesh import BATCH, layout

NAMES = {"batch": BATCH, "heads": "tensor", "columns": "tensor"}

Dims = tuple[str | None, ...]


def per_device(
    f: Callable, inputs: Sequence[Dims | None], outputs: Dims | tuple, *, auto: bool = False
) -> Callable:
    """`f` over each device's part of its arguments; without a mesh `f` itself.

    Args:
      f: of positional arguments, pytrees of arrays (or None).
      inputs: per argument, which of its dimensions are `batch`, `heads` or `columns`; leaves of a
        pytree share them. None: the argument is whole on every device.
      outputs: of the result, or, nested as it is, of the arrays of a tuple.
      auto: leave the axis `tensor` to XLA, within `f` too.

    A name is not cut at all where one of its dimensions is not divisible.
    """
    current = layout()
    if current is None:
        return f
    sizes = current.sizes
    names = {n: axes for n, axes in NAMES.items() if not (auto and axes == "tensor")}
    parts = {"batch": current.batch_shards, "heads": sizes["tensor"], "columns": sizes["tensor"]}

    def run(*args):
        whole = {
            name
            for dims, arg in zip(inputs, args, strict=True)
            for leaf in jax.tree.leaves(arg)
            for name, size in zip(dims or (), leaf.shape, strict=False)
            if name is not None and size % parts[name]
        }

        def spec(dims):
            if dims and isinstance(dims[0], tuple):
                return tuple(map(spec, dims))
            return P(*(names.get(n) if n not in whole else None for n in dims or ()))

        manual = {axis for axis in sizes if not (auto and axis == "tensor")}
        return jax.shard_map(
            f,
            in_specs=tuple(map(spec, inputs)),
            out_specs=spec(outputs),
            axis_names=manual,
            check_vma=False,
        )(*args)

    return run
