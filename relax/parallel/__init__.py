"""One program on many devices: a mesh, rules of what lies where, and arrays placed by them.

    with parallel.use(parallel.make_mesh("data=2,fsdp=4"), heads=model.config.num_key_value_heads):
        state = trainer.train(loader, key=jax.random.key(0))

Without a mesh in use every function here leaves things as they are.
"""

from relax.parallel.arrays import (
    batch_shapes,
    born,
    bytes_per_device,
    constrain,
    gathered,
    gathered_shapes,
    local_rows,
    pinned,
    place_batch,
    place_own,
    placed,
    put,
    sharded_shapes,
    sharding_of,
    to_host,
    used,
)
from relax.parallel.mesh import Layout, batch_shards, layout, make_mesh, platform, use
from relax.parallel.per_device import local
from relax.parallel.rules import RULES, Rule, read_rules

__all__ = [
    "RULES",
    "Layout",
    "Rule",
    "batch_shapes",
    "batch_shards",
    "born",
    "bytes_per_device",
    "constrain",
    "gathered",
    "gathered_shapes",
    "layout",
    "local",
    "local_rows",
    "make_mesh",
    "pinned",
    "place_batch",
    "place_own",
    "placed",
    "platform",
    "put",
    "read_rules",
    "sharded_shapes",
    "sharding_of",
    "to_host",
    "use",
    "used",
]
