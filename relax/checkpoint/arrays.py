"""The arrays of a checkpoint on disk: one zarr array per leaf, all in one OCDBT database.

tensorstore reads and writes them. Several processes write through orbax, which gives each a
database of its own and merges them; it writes the same format.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from relax.parallel import processes

# Limit of the second copy of the leaves that are being written.
_IN_FLIGHT_BYTES = 200_000_000
_CHUNK_ELEMENTS = 1 << 24  # compressed at once, by one thread
_STORED = {
    "metadata": {"compressor": {"id": "zstd", "level": 1}},
    "store_data_equal_to_fill_value": True,  # so that a chunk that is missing is a lost one
}
_HOST = "pinned_host"  # memory kind that outlives a donated array


def write_arrays(directory: Path, arrays: dict) -> None:
    """Writes arrays under their names. Computes nothing on devices, so any thread may call it."""
    if processes.count() > 1:
        _write_together(directory, arrays)
        return
    database = ts.Context()  # opens it once
    transaction, waiting = ts.Transaction(), 0
    for name, array in arrays.items():
        if waiting and waiting + array.nbytes > _IN_FLIGHT_BYTES:
            transaction.commit_sync()
            transaction, waiting = ts.Transaction(), 0
        stored = ts.open(
            _spec(directory, name) | _STORED,
            create=True,
            dtype=ts.dtype(array.dtype),
            shape=array.shape,
            chunk_layout=ts.ChunkLayout(write_chunk=ts.ChunkLayout.Grid(elements=_CHUNK_ELEMENTS)),
            transaction=transaction,
            context=database,
        ).result()
        stored.write(host_array(array), can_reference_source_data_indefinitely=True).result()
        waiting += array.nbytes
    transaction.commit_sync()


def read_arrays(
    directory: Path, shapes: dict[str, tuple[list[int], str]]
) -> Iterator[np.ndarray | None]:
    """Reads arrays one after another.

    Args:
      shapes: the shape and dtype of each array, by name.

    Yields:
      Each array in that order; None for one that cannot be read or has another shape.
    """
    database = ts.Context()
    for name, (shape, dtype) in shapes.items():
        if not math.prod(shape):
            yield np.empty(shape, jnp.dtype(dtype))
            continue
        try:
            stored = _spec(directory, name)
            opened = ts.open(stored, open=True, read=True, context=database).result()
            yield opened.read().result() if list(opened.shape) == shape else None
        except ValueError:  # tensorstore's error for anything unreadable
            yield None


def _spec(directory: Path, name: str) -> dict:
    store = {"driver": "ocdbt", "base": f"file://{directory}/", "path": name}
    return {"driver": "zarr", "kvstore": store}


def host_array(array) -> np.ndarray:
    """The values of an array, on the host."""
    if isinstance(array, jax.Array) and not _on_host(array):
        # A jax array keeps the host copy made by reading it: read through a temporary array.
        array = jnp.copy(array)
    return np.asarray(array, order="C")


def _on_host(array: jax.Array) -> bool:
    kind = array.sharding.memory_kind
    return kind == _HOST or all(device.platform == "cpu" for device in array.devices())


def copies_are_apart() -> bool:
    """Whether host copies use other memory than computations."""
    device = jax.local_devices()[0]
    return device.platform != "cpu" and _HOST in {m.kind for m in device.addressable_memories()}


def host_copy(array):
    """A copy on the host, which outlives the array."""
    if isinstance(array, np.ndarray):
        return array.copy()
    where = array.sharding.with_memory_kind(_HOST)
    return jax.device_put(array, where, may_alias=False)  # it may be on the host already


def where(directory: Path) -> str:
    """Prefix of barrier names for a checkpoint, since another thread may write elsewhere."""
    return directory.parent.name


def _write_together(directory: Path, arrays: dict) -> None:
    """The same by all processes, each its own parts."""
    in_flight = max([_IN_FLIGHT_BYTES, *(array.nbytes for array in arrays.values())])
    # Orbax waits for the other processes without using their devices if it is given the
    # processes, under a name that no other save uses.
    together = ocp.options.MultiprocessingOptions(
        active_processes=set(range(processes.count())),
        barrier_sync_key_prefix=processes.unique_name(where(directory.parent)),
    )
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=in_flight / 1e9 + 0.001, multiprocessing_options=together
    )
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=together) as orbax:
        orbax.save(directory, arrays)


@contextlib.contextmanager
def _quiet():
    """Silences orbax's log of a traceback per thread for an error that it raises anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
