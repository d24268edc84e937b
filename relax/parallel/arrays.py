"""Sharded arrays: weights, optimizer state and batches placed by the rules, and read back.

Without an active mesh every function returns its argument, and `init_sharded` calls its function;
only the parts of a state that lie on the host have a placement there too.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from relax.optimizers import lies_on_host
from relax.optimizers.host import MEMORY_KIND
from relax.parallel.mesh import BATCH, Layout, layout
from relax.parallel.rules import spec_of


def sharding_of(path: str, shape) -> NamedSharding | None:
    """The sharding of a leaf of a state or of parameters; None without a mesh."""
    current = layout()
    return None if current is None else _sharding(current, path, shape)


def _sharding(current: Layout, path: str, shape) -> NamedSharding:
    spec = spec_of(path, shape, current.rules, current.sizes, current.heads)
    where = NamedSharding(current.mesh, spec)
    return where.with_memory_kind(MEMORY_KIND) if lies_on_host(path, shape) else where


def _place(current: Layout | None, path: str, shape) -> Sharding | None:
    """The sharding of a leaf; None: wherever jax puts it, on one device."""
    if current is not None:
        return _sharding(current, path, shape)
    if not lies_on_host(path, shape):
        return None
    return SingleDeviceSharding(jax.local_devices()[0], memory_kind=MEMORY_KIND)


def _map(f, tree):
    """Maps f(path, leaf) over all leaves, with paths like `params/layers_0/q_proj/kernel`."""

    def one(path, leaf):
        return f(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(one, tree)


def sharded_shapes(tree):
    """The shapes of a state or of parameters, with their shardings."""
    current = layout()

    def shape(path, leaf):
        where = _place(current, path, leaf.shape)
        if where is None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return _map(shape, tree)


def init_sharded(f, *args):
    """`f(*args)`, compiled so that every leaf is created with its final sharding."""
    current = layout()
    shapes = jax.eval_shape(f, *args)
    places = _map(lambda path, leaf: _place(current, path, leaf.shape), shapes)
    if not jax.tree.leaves(places):
        return f(*args)
    return jax.jit(f, out_shardings=places)(*args)


def shard(tree):
    """Shards a state or parameters by the rules; inside jit the same as `constrain_tree`."""
    current = layout()
    if current is None:
        return tree

    def move(path, leaf):
        where = _sharding(current, path, np.shape(leaf))
        if isinstance(leaf, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(leaf, where)
        return device_put(leaf, where)

    return _map(move, tree)


def device_put(leaf, where: Sharding):
    """Puts an array, equal in every process, on the devices with sharding `where`."""
    if isinstance(leaf, jax.Array) and _is_there(leaf, where):
        return leaf
    if where.is_fully_addressable or not isinstance(where, NamedSharding):
        return jax.device_put(leaf, where)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = device_put(jax.random.key_data(leaf), NamedSharding(where.mesh, P()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(leaf)
    value = np.asarray(leaf)  # the same in every process
    return jax.make_array_from_callback(value.shape, where, value.__getitem__)


def _is_there(leaf: jax.Array, where: Sharding) -> bool:
    kinds = [sharding.memory_kind == MEMORY_KIND for sharding in (leaf.sharding, where)]
    return kinds[0] == kinds[1] and leaf.sharding.is_equivalent_to(where, leaf.ndim)


def constrain_tree(tree):
    """Within a compiled function: constrains leaves to the shardings of the rules."""
    current = layout()
    if current is None:
        return tree

    def pin(path, leaf):
        where = _sharding(current, path, jnp.shape(leaf))
        return jax.lax.with_sharding_constraint(leaf, where)

    return _map(pin, tree)


def unshard_fsdp(tree):
    """Within a compiled function: gathers parameters over all axes but `tensor`, for many uses."""
    current = layout()
    if current is None:
        return tree

    def gather(path, leaf):
        where = NamedSharding(current.mesh, _in_use(current, path, leaf.shape))
        return jax.lax.with_sharding_constraint(leaf, where)

    return _map(gather, tree)


def unsharded_shapes(tree, dtype):
    """Shapes of the result of `unshard_fsdp` for parameters with matrices of a dtype."""
    current = _layout_in_use()

    def shape(path, leaf):
        where = NamedSharding(current.mesh, _in_use(current, path, leaf.shape))
        is_part = path.endswith(("/codes", "/scales"))  # of a quantised weight
        kind = leaf.dtype if leaf.ndim < 2 or is_part else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=where)

    return _map(shape, tree)


def gather_for_use(weight, *path: str, dtype=None):
    """Gathers a weight over `fsdp` and `data` for the multiplication of a layer.

    Its gradient is sharded as the weight is stored. On a mesh it is cast to `dtype`, if given,
    before it is gathered.
    """
    current = layout()
    if current is None:
        return weight
    weight = weight if dtype is None else weight.astype(dtype)
    name = "/".join(path)
    stored = _sharding(current, name, weight.shape)
    where = NamedSharding(current.mesh, _in_use(current, name, weight.shape))
    return _used(where, stored, weight)


def _in_use(current: Layout, path: str, shape) -> P:
    spec = spec_of(path, shape, current.rules, current.sizes, current.heads)

    def kept(entry):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return "tensor" if "tensor" in axes else None

    return P(*map(kept, spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _used(where, stored, weight):
    return jax.lax.with_sharding_constraint(weight, where)


def _used_forward(where, stored, weight):
    return _used(where, stored, weight), None


def _used_backward(where, stored, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_used.defvjp(_used_forward, _used_backward)


def constrain(x, *dims: str | None):
    """Within a compiled function: constrains the sharding of an activation.

    Args:
      x: the activation.
      dims: for each dimension `batch`, `tensor`, `replicated`, or None: chosen by XLA, also if the
        mesh does not divide the dimension.
    """
    current = layout()
    if current is None:
        return x
    parts = {"batch": current.batch_shards, "tensor": current.sizes["tensor"], "replicated": 1}
    axes = {"batch": BATCH, "tensor": "tensor", "replicated": None}

    def entry(name, size):
        return P.UNCONSTRAINED if name is None or size % parts[name] else axes[name]

    spec = P(*map(entry, dims, x.shape))
    return jax.lax.with_sharding_constraint(x, NamedSharding(current.mesh, spec))


def _rows(current: Layout, shape) -> NamedSharding:
    if shape and shape[0] % current.batch_shards:
        raise ValueError(
            f"the rows of a batch must be a multiple of the mesh's data x fsdp, got {shape[0]} "
            f"rows for {current.sizes['data']} x {current.sizes['fsdp']}. Change the batch size, "
            "or the mesh."
        )
    return NamedSharding(current.mesh, P(BATCH) if shape else P())


def shard_batch(batch):
    """Shards the rows of a batch of numpy arrays `[B, ...]`, all rows in every process.

    Arrays that are on the mesh already stay there.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    current = layout()
    if current is None:
        return batch

    def place(leaf):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == current.mesh.size > 1:
            return leaf
        return device_put(leaf, _rows(current, np.shape(leaf)))

    return jax.tree.map(place, batch)


def _layout_in_use() -> Layout:
    current = layout()
    assert current is not None, "this needs an active mesh"
    return current


def batch_shapes(batch):
    """The shapes of a batch's arrays, with their shardings."""
    current = layout()
    if current is None:
        return batch

    def shape(leaf):
        where = _rows(current, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(shape, batch)


def to_host(array) -> np.ndarray:
    """Copies an array to the host; if it spans processes, all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated:
            assert isinstance(array.sharding, NamedSharding)
            everywhere = NamedSharding(array.sharding.mesh, P())
            array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
        array = array.addressable_data(0)
    return np.asarray(array)


def bytes_on_host(tree) -> int:
    """Bytes of those leaves of a state (arrays or shapes with shardings) that are on the host."""

    def is_there(leaf):
        where = getattr(leaf, "sharding", None)
        return where is not None and where.memory_kind == MEMORY_KIND

    return bytes_per_device([leaf for leaf in jax.tree.leaves(tree) if is_there(leaf)])


def bytes_per_device(tree) -> int:
    """Bytes of a state's leaves (arrays or shapes) for one device, wherever they lie."""

    def size(leaf):
        where = getattr(leaf, "sharding", None)
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        dtype = leaf.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return 8 * math.prod(shape)
        return math.prod(shape) * jnp.dtype(dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))
