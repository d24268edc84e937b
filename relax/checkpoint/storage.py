"""One checkpoint on the disk: how its leaves and files are named, written, summed and read.

`relax.checkpoint` says what the files are and which checkpoint is written or read when.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from relax import parallel
from relax.config.text import join_some
from relax.errors import CheckpointError
from relax.files import STATE_FILE, file_crc, fsync_path
from relax.parallel import processes

FORMAT = 1

_ARRAYS = "arrays"
_CHECKSUMS = "checksums.json"
# Orbax holds a second copy of the leaves that it is writing; this bounds it.
_IN_FLIGHT_BYTES = 200_000_000
_HOST = "pinned_host"  # the kind of memory that outlives a donated array


class DamagedError(CheckpointError):
    """The bytes are not the ones that were written: an older checkpoint may still be good."""


def named_leaves(tree) -> dict:
    """The leaves of a pytree under names such as `params/layer_0/kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError(
            "the leaves of a state must have distinct names when joined by '/', "
            f"got {len(paths)} leaves under {len(leaves)} names. Take the '/' out of the keys."
        )
    return leaves


def tree_bytes(tree) -> int:
    """How many bytes the leaves of a pytree (or of its ShapeDtypeStructs) take."""
    specs = map(_spec, named_leaves(tree).values())
    return sum(math.prod(s["shape"]) * jnp.dtype(s["dtype"]).itemsize for s in specs)


def _spec(leaf) -> dict:
    """What a leaf is stored as: shape, dtype and, for a typed key, its implementation."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        # The dtype reads key<fry>; the name of its implementation is what wrap_key_data takes.
        return _spec(data) | {"key": str(jax.random.key_impl(jnp.empty((), leaf.dtype)))}
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}


def _stored(leaf):
    """The array that stands for a leaf on the disk."""
    if isinstance(leaf, jax.Array):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf
    return np.asarray(leaf)


def place(array: np.ndarray, like):
    """Turns a stored array into what the template has: device, sharding, key, kind of number."""
    if isinstance(like, (bool, int, float, complex)):
        return type(like)(array.item())
    if isinstance(like, (np.ndarray, np.generic)):
        return array
    # Only a committed array names its device; pinning the others would clash with a later mesh.
    sharding = like.sharding if getattr(like, "committed", True) else None
    if "key" in (spec := _spec(like)):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=spec["key"])
        return key if sharding is None else parallel.device_put(key, sharding)
    # The copy is not made yet, and holds on to the array until it is: wait, to hold one at a time.
    return jax.block_until_ready(
        jax.device_put(array) if sharding is None else parallel.device_put(array, sharding)
    )


def _leaf_sums(directory: Path, leaves: dict) -> dict[str, dict]:
    """What tells each leaf's bytes: `crc32` of all, or, of a leaf that lies in several processes,
    `parts`: of every part its bounds, `[[start, stop], ...]`, and its crc32.

    What a process knows of these it leaves in the directory; process 0 collects it.
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
    """The parts of an array that this process, of all that hold them, is the one to tell of."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _part_sum(array: jax.Array, shard) -> list:
    bounds = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
    return [bounds, leaf_crc(shard.data)]


def leaf_crc(array) -> int:
    """crc32 of an array's bytes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = parallel.to_host(array)
    if isinstance(array, jax.Array) and not _on_host(array):
        # A jax array keeps the host copy that it was read through: read through a passing one.
        array = jnp.copy(array)
    flat = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return zlib.crc32(flat)  # type: ignore[arg-type]


def _on_host(array: jax.Array) -> bool:
    kind = array.sharding.memory_kind
    return kind == _HOST or all(device.platform == "cpu" for device in array.devices())


class Snapshot(NamedTuple):
    """What a checkpoint will hold.

    Attributes:
      step: optimizer updates done.
      arrays: what is stored of each leaf, by its name.
      specs: shape, dtype and kind of key of each leaf.
      info: the bytes of relax_state.json.
    """

    step: int
    arrays: dict
    specs: dict[str, dict]
    info: bytes


def snapshot(step: int, state, progress: dict, *, copied: bool) -> Snapshot:
    """Takes what will be written; `copied` to the host, it outlives the state."""
    leaves = named_leaves(state)
    info = {"format": FORMAT, "step": int(step), "progress": progress, "fingerprint": fingerprint()}
    try:
        info_bytes = json.dumps(info, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the progress of a run must be JSON: {error}") from error
    arrays = {name: _stored(leaf) for name, leaf in leaves.items()}
    if copied:
        arrays = {name: _copied(array) for name, array in arrays.items()}
    return Snapshot(int(step), arrays, {n: _spec(leaf) for n, leaf in leaves.items()}, info_bytes)


def copies_are_apart() -> bool:
    """Whether a copy on the host takes none of the memory that a run computes in."""
    device = jax.local_devices()[0]
    return device.platform != "cpu" and _HOST in {m.kind for m in device.addressable_memories()}


def _copied(array):
    if isinstance(array, np.ndarray):
        return array.copy()
    return jax.device_put(array, array.sharding.with_memory_kind(_HOST))


def write(directory: Path, taken: Snapshot) -> None:
    """Writes a whole checkpoint into a new directory and gets it onto the disk.

    Nothing is computed on devices, so this may go on in a thread while updates do.
    """
    if processes.is_main():
        directory.mkdir()
    processes.barrier(f"{where(directory)}: directory")
    sums = _leaf_sums(directory, taken.arrays)
    # Orbax refuses arrays without elements; their shape, in the checksums, is all there is to them.
    full = {name: array for name, array in taken.arrays.items() if array.size}
    in_flight = max([_IN_FLIGHT_BYTES, *(array.nbytes for array in full.values())])
    together = _together(directory)
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=in_flight / 1e9 + 0.001, multiprocessing_options=together
    )
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=together) as orbax:
        orbax.save(directory / _ARRAYS, full)
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


def where(directory: Path) -> str:
    """What barriers of a checkpoint's writers begin with: another thread may write elsewhere."""
    return directory.parent.name


def _together(directory: Path) -> ocp.options.MultiprocessingOptions:
    """Orbax waits for the other processes over the network, not in a program on their devices.

    It does so where it is told which processes there are, under a name that no other save has.
    """
    if processes.count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(processes.count())),
        barrier_sync_key_prefix=processes.unique_name(where(directory)),
    )


@contextlib.contextmanager
def _quiet():
    """Orbax logs a traceback per thread for an error that it raises as well: once is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _seal(sums: dict) -> bytes:
    """JSON whose first field is the crc32 of all the bytes after it."""
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
    except FileNotFoundError as error:
        raise DamagedError(
            f"checkpoint '{path}' is damaged: file {Path(error.filename).name} is missing."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"checkpoint '{path}' is damaged: file {_CHECKSUMS}.") from error
    if zlib.crc32(info_bytes) != sums["files"][STATE_FILE]:
        raise DamagedError(f"checkpoint '{path}' is damaged: file {STATE_FILE}.")
    info = json.loads(info_bytes)
    if info["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint '{path}' has format {info['format']}, this version of ReLax reads "
            f"{FORMAT}. Resume it with the version that wrote it."
        )
    return sums, info


def read_arrays(path: Path, specs: dict) -> tuple[dict, list[str]]:
    """Reads all leaves as numpy arrays; names those that are not what was written."""
    full = {name: spec for name, spec in specs.items() if math.prod(spec["shape"])}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in full}
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            arrays = orbax.restore(path / _ARRAYS, restore_args=how)
    except Exception as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be read: {error}") from error
    for name in specs.keys() - full.keys():
        arrays[name] = np.empty(specs[name]["shape"], jnp.dtype(specs[name]["dtype"]))
    return arrays, [name for name, spec in specs.items() if not _intact(arrays.get(name), spec)]


def read_leaf(path: Path, name: str, spec: dict) -> np.ndarray | None:
    """One leaf, below orbax, which reads all or none; None: it is not what was written."""
    if not math.prod(spec["shape"]):
        return np.empty(spec["shape"], jnp.dtype(spec["dtype"]))
    store = {"driver": "ocdbt", "base": f"file://{path / _ARRAYS}/", "path": name}
    try:
        opened = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        if list(opened.shape) == spec["shape"]:
            array = opened.read().result()
            return array if _intact(array, spec) else None
    except ValueError:  # what tensorstore raises for anything that it cannot make sense of
        pass
    return None


def damaged_leaves(path: Path, specs: dict) -> list[str]:
    """Names the leaves that damaged files have hit, by reading one after the other."""
    return [name for name, spec in specs.items() if read_leaf(path, name, spec) is None]


def _intact(array: np.ndarray | None, spec: dict) -> bool:
    return (
        array is not None
        and list(array.shape) == spec["shape"]
        and str(array.dtype) == spec["dtype"]
        and all(leaf_crc(part) == crc for part, crc in _summed(array, spec))
    )


def _summed(array: np.ndarray, spec: dict):
    """Parts of a leaf, and what was the crc32 of each when it was written."""
    if "parts" not in spec:
        return [(array, spec["crc32"])]
    return [(array[tuple(slice(*b) for b in bounds)], crc) for bounds, crc in spec["parts"]]


def check_structure(path: Path, want: dict, have: dict) -> None:
    """Refuses a template whose leaves are not those of the checkpoint."""
    problems = [f"missing in the checkpoint: {name}" for name in want if name not in have]
    problems += [f"not in this state: {name}" for name in have if name not in want]
    for name in want.keys() & have.keys():
        here, there = _describe(_spec(want[name])), _describe(have[name])
        if here != there:
            problems.append(f"{name} is {there} in the checkpoint, {here} in this state")
    if problems:
        raise CheckpointError(
            f"checkpoint '{path}' must hold the leaves of this state, and differs: "
            f"{join_some(sorted(problems), 8)}. Is it of the same model and optimizer?"
        )


def _describe(spec: dict) -> str:
    kind = f"key of {spec['key']}, " if "key" in spec else ""
    return f"{kind}{spec['dtype']}{spec['shape']}"


@functools.cache
def _versions() -> dict:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}


def fingerprint() -> dict:
    """What decides, besides the configuration, which bits a run computes."""
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
