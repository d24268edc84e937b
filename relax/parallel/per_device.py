"""Functions that every device runs on its own shard, for rows and heads that do not interact.

XLA partitions matrix products along any axis by itself. Operations that it cannot partition (a
kernel, a sort of tokens, a product over merged axes) run this way.
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
    """Wraps `f` to run on each device's shard of its arguments; without a mesh returns `f`.

    Args:
      f: a function of positional arguments, pytrees of arrays (or None).
      inputs: for each argument its dimensions named `batch`, `heads` or `columns`, the same for all
        leaves of a pytree. None: the argument is replicated.
      outputs: the dimensions of the result, nested like it if it is a tuple.
      auto: leave the axis `tensor` to XLA, within `f` too.

    A name is not sharded if one of its dimensions is not divisible.
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
