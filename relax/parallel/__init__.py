"""Parallelism: a mesh of devices, sharding rules, and arrays sharded by them.

    with parallel.use(parallel.make_mesh("data=2,fsdp=4"), heads=model.config.tensor_heads):
        state = trainer.train(loader, key=jax.random.key(0))

Without an active mesh every function here leaves arrays unchanged.
"""

from relax.parallel.arrays import (
    batch_shapes,
    bytes_on_host,
    bytes_per_device,
    constrain,
    constrain_tree,
    device_put,
    gather_for_use,
    init_sharded,
    shard,
    shard_batch,
    sharded_shapes,
    sharding_of,
    to_host,
    unshard_fsdp,
    unsharded_shapes,
)
from relax.parallel.mesh import Layout, batch_shards, layout, make_mesh, platform, use
from relax.parallel.per_device import per_device
from relax.parallel.rules import RULES, Rule, read_rules

__all__ = [
    "RULES",
    "Layout",
    "Rule",
    "batch_shapes",
    "batch_shards",
    "init_sharded",
    "bytes_on_host",
    "bytes_per_device",
    "constrain",
    "unshard_fsdp",
    "unsharded_shapes",
    "layout",
    "per_device",
    "make_mesh",
    "constrain_tree",
    "shard_batch",
    "shard",
    "platform",
    "device_put",
    "read_rules",
    "sharded_shapes",
    "sharding_of",
    "to_host",
    "use",
    "gather_for_use",
]
