"""Storage of a checkpoint: names, writing, checksums and reading of its leaves and files.

`relax.checkpoint.checkpointer` documents the files and manages the checkpoints.
"""

import functools
import importlib.metadata
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.checkpoint.arrays import host_array, host_copy, read_arrays, where, write_arrays
from relax.config.text import join_some
from relax.errors import CheckpointError, ResumeError
from relax.files import STATE_FILE, file_crc, fsync_path
from relax.parallel import processes

FORMAT = 2  # 1: ReLax 0.1, whose callbacks had other states, and whose arrays orbax wrote

_ARRAYS = "arrays"
_CHECKSUMS = "checksums.json"


class DamagedError(ResumeError):
    """The bytes differ from the written ones; an older checkpoint may still be intact."""


def named_leaves(tree) -> dict:
    """The leaves of a pytree under names such as `params/layer_0/kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError(
            "the leaves of a state must have distinct names when joined by '/', "
            f"got {len(paths)} leaves under {len(leaves)} names. Remove '/' from the keys."
        )
    return leaves


def tree_bytes(tree) -> int:
    """Total bytes of the leaves of a pytree (or of its ShapeDtypeStructs)."""
    specs = map(_spec, named_leaves(tree).values())
    return sum(math.prod(s["shape"]) * jnp.dtype(s["dtype"]).itemsize for s in specs)


def _spec(leaf) -> dict:
    """The stored form of a leaf: shape, dtype and, for a typed key, its implementation."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _key_spec(leaf.shape, leaf.dtype)
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}


@functools.cache  # jax keeps an entry for every call of eval_shape
def _key_spec(shape: tuple[int, ...], dtype) -> dict:
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
    # The dtype reads key<fry>; wrap_key_data takes the name of its implementation.
    return _spec(data) | {"key": str(jax.random.key_impl(jnp.empty((), dtype)))}


def _stored(leaf):
    """The array that represents a leaf on disk."""
    if isinstance(leaf, jax.Array):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf
    return np.asarray(leaf)


def place(array: np.ndarray, like):
    """Converts a stored array to the template's device, sharding, key type and number type."""
    if isinstance(like, (bool, int, float, complex)):
        return type(like)(array.item())
    if isinstance(like, (np.ndarray, np.generic)):
        return array
    # Only a committed array has a device; committing others would conflict with a later mesh.
    sharding = like.sharding if getattr(like, "committed", True) else None
    if "key" in (spec := _spec(like)):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=spec["key"])
        return key if sharding is None else parallel.device_put(key, sharding)
    # The copy is asynchronous and keeps the array alive: wait, to hold one at a time.
    return jax.block_until_ready(
        jax.device_put(array) if sharding is None else parallel.device_put(array, sharding)
    )


def _leaf_sums(directory: Path, leaves: dict) -> dict[str, dict]:
    """Checksums of each leaf: `crc32`, or for a leaf that spans processes `parts`: the bounds
    `[[start, stop], ...]` and the crc32 of every part.

    Each process writes its own parts to the directory; process 0 collects them.
    """
    cut = {n: a for n, a in leaves.items() if isinstance(a, jax.Array)}
    cut = {n: a for n, a in cut.items() if not a.is_fully_addressable}
    if cut:
        mine = {name: [_part_sum(array, s) for s in _firsts(array)] for name, array in cut.items()}
        (directory / f"parts-{processes.index()}.json").write_text(json.dumps(mine))
    processes.barrier(f"{where(directory)}: sums")
    if not processes.is_main():
        return {}
    told = []
    for path in sorted(directory.glob("parts-*.json")):
        told.append(json.loads(path.read_bytes()))
        path.unlink()
    return {
        name: {"parts": [part for parts in told for part in parts[name]]}
        if name in cut
        else {"crc32": leaf_crc(array)}
        for name, array in leaves.items()
    }


def _firsts(array: jax.Array) -> list:
    """The parts of an array for which this process, of all that hold them, is responsible."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _part_sum(array: jax.Array, shard) -> list:
    bounds = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
    return [bounds, leaf_crc(shard.data)]


def leaf_crc(array) -> int:
    """crc32 of an array's bytes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = parallel.to_host(array)
    flat = host_array(array).reshape(-1).view(np.uint8)
    return zlib.crc32(flat.data)


class Snapshot(NamedTuple):
    """The contents of a checkpoint before it is written.

    Attributes:
      step: optimizer updates done.
      arrays: the stored array of each leaf by name.
      specs: shape, dtype and key implementation of each leaf.
      info: the bytes of relax_state.json.
    """

    step: int
    arrays: dict
    specs: dict[str, dict]
    info: bytes


def snapshot(step: int, state, progress: dict, *, copied: bool) -> Snapshot:
    """Collects the contents of a checkpoint; if `copied` to the host, they outlive the state."""
    leaves = named_leaves(state)
    info = {"format": FORMAT, "step": int(step), "progress": progress, "fingerprint": fingerprint()}
    try:
        info_bytes = json.dumps(info, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the progress of a run must be JSON: {error}") from error
    arrays = {name: _stored(leaf) for name, leaf in leaves.items()}
    if copied:
        arrays = {name: host_copy(array) for name, array in arrays.items()}
    return Snapshot(int(step), arrays, {n: _spec(leaf) for n, leaf in leaves.items()}, info_bytes)


def write(directory: Path, taken: Snapshot) -> None:
    """Writes a checkpoint into a new directory and syncs it to disk.

    Computes nothing on devices, so it can run in a thread beside updates.
    """
    if processes.is_main():
        directory.mkdir()
    processes.barrier(f"{where(directory)}: directory")
    sums = _leaf_sums(directory, taken.arrays)
    # Arrays without elements have no bytes; the checksums hold their shape, which is all of them.
    full = {name: array for name, array in taken.arrays.items() if array.size}
    write_arrays(directory / _ARRAYS, full)
    processes.barrier(f"{where(directory)}: arrays")
    if not processes.is_main():
        return
    (directory / STATE_FILE).write_bytes(taken.info)
    sums = {name: spec | sums[name] for name, spec in taken.specs.items()}
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    files = {name: file_crc(directory / name) for name in names}
    (directory / _CHECKSUMS).write_bytes(_seal({"leaves": sums, "files": files}))
    for path in [*directory.rglob("*"), directory]:
        fsync_path(path)


def _seal(sums: dict) -> bytes:
    """JSON whose first field is the crc32 of all following bytes."""
    rest = json.dumps(sums)[1:].encode()
    return b'{"crc32": "%08x", ' % zlib.crc32(rest) + rest


def read_manifests(path: Path) -> tuple[dict, dict]:
    """Verifies and reads checksums.json and relax_state.json."""
    try:
        raw = (path / _CHECKSUMS).read_bytes()
        sums = json.loads(raw)
        del sums["crc32"]
        if _seal(sums) != raw:
            raise ValueError("not the bytes that were written")
        info_bytes = (path / STATE_FILE).read_bytes()
    except OSError as error:
        name, missing = Path(error.filename).name, isinstance(error, FileNotFoundError)
        raise DamagedError(
            f"checkpoint '{path}' is damaged: file {name}{' is missing' * missing}."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"checkpoint '{path}' is damaged: file {_CHECKSUMS}.") from error
    if zlib.crc32(info_bytes) != sums["files"][STATE_FILE]:
        raise DamagedError(f"checkpoint '{path}' is damaged: file {STATE_FILE}.")
    info = json.loads(info_bytes)
    if info["format"] != FORMAT:
        raise ResumeError(
            f"checkpoint '{path}' has format {info['format']}, this version of ReLax reads "
            f"{FORMAT}. Resume it with the version that wrote it, or start a new run from the "
            "exported model."
        )
    return sums, info


def read_leaves(path: Path, specs: dict[str, dict]) -> Iterator[np.ndarray | None]:
    """Reads the leaves of the given specs one after another; yields None for a damaged one."""
    shapes = {name: (spec["shape"], spec["dtype"]) for name, spec in specs.items()}
    arrays = read_arrays(path / _ARRAYS, shapes)
    for array, spec in zip(arrays, specs.values(), strict=True):
        yield array if _intact(array, spec) else None


def damaged_leaves(path: Path, specs: dict) -> list[str]:
    """Names of leaves in damaged files."""
    read = zip(specs, read_leaves(path, specs), strict=True)
    return [name for name, array in read if array is None]


def _intact(array: np.ndarray | None, spec: dict) -> bool:
    return (
        array is not None
        and list(array.shape) == spec["shape"]
        and str(array.dtype) == spec["dtype"]
        and all(leaf_crc(part) == crc for part, crc in _summed(array, spec))
    )


def _summed(array: np.ndarray, spec: dict):
    """Parts of a leaf, and the stored crc32 of each."""
    if "parts" not in spec:
        return [(array, spec["crc32"])]
    return [(array[tuple(slice(*b) for b in bounds)], crc) for bounds, crc in spec["parts"]]


def check_structure(path: Path, want: dict, have: dict) -> None:
    """Checks that a template has the same leaves as the checkpoint."""
    problems = [f"missing in the checkpoint: {name}" for name in want if name not in have]
    problems += [f"not in this state: {name}" for name in have if name not in want]
    for name in want.keys() & have.keys():
        here, there = _describe(_spec(want[name])), _describe(have[name])
        if here != there:
            problems.append(f"{name} is {there} in the checkpoint, {here} in this state")
    if problems:
        raise ResumeError(
            f"checkpoint '{path}' must hold the leaves of this state, but differs: "
            f"{join_some(sorted(problems), 8)}. Check that it has the same model and optimizer."
        )


def _describe(spec: dict) -> str:
    kind = f"key of {spec['key']}, " if "key" in spec else ""
    return f"{kind}{spec['dtype']}{spec['shape']}"


@functools.cache
def _versions() -> dict:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}


def fingerprint() -> dict:
    """Versions and settings that affect the bits of a run, besides the configuration."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _versions() | {
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_threads": cores,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def fingerprint_diff(old: dict, new: dict) -> str:
    """The fields that differ, as one line; empty if none do.

    >>> fingerprint_diff({"jax": "0.10.2", "cpu_threads": 2}, {"jax": "0.12.0", "cpu_threads": 2})
    'jax 0.10.2 -> 0.12.0'
    """
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names)
