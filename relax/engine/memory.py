"""Memory of an update, from XLA's analysis, and memory of the device, before training starts.

`update_sizes` compiles the step for the largest batch; the first call of the step reuses the
compiled program.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.config.text import format_bytes
from relax.data.loader import DataLoader
from relax.parallel.cpu import release_freed_memory
from relax.trainers.trainer import LoggedBatch

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Peak memory of an update in bytes.

    Attributes:
      parameters: trained parameters.
      frozen: frozen weights.
      gradients: gradients of all parameters, and their sums over micro-batches.
      optimizer: the optimizer's state.
      activations: the rest of XLA's allocation, including batch and results.
      host: what lies in the host's memory, apart from the device; not part of the total.
    """

    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host

    @property
    def held(self) -> int:
        """Bytes of the state, which outlives an update."""
        return self.parameters + self.frozen + self.optimizer


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Memory of a device in bytes.

    Attributes:
      total: all of its memory; None: unknown.
      free: memory that is free now or held by this run; None: unknown.
      name: name of the device.
    """

    total: int | None
    free: int | None
    name: str


def state_sizes(state, accumulation: int) -> Sizes:
    """Memory that follows from a `TrainState` (or its shapes): all but the activations."""
    parameters, frozen, optimizer = map(
        parallel.bytes_per_device, (state.params, state.frozen, state.opt_state)
    )
    host = parallel.bytes_on_host(state.opt_state) if parallel.platform() != "cpu" else 0
    gradients = parameters
    if accumulation > 1:  # float32 sums in addition to the gradient of a micro-batch
        gradients += parallel.bytes_per_device(
            jax.tree.map(_in_float32, state.params, is_leaf=lambda leaf: hasattr(leaf, "shape"))
        )
    return Sizes(parameters, frozen, gradients, optimizer - host, host=host)


def _in_float32(leaf):
    where = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=where)


def update_sizes(trainer, state, batch) -> Sizes:
    """Compiles the update for a batch (arrays or their shapes) and reads XLA's memory analysis.

    Returns:
      The sizes; their total is XLA's.
    """
    batch = parallel.batch_shapes(batch)
    account = trainer.train_step.lower(state, batch).compile().memory_analysis()
    release_freed_memory()  # compiling took much of it
    return with_activations(state_sizes(state, trainer.gradient_accumulation_steps), account)


def total_bytes(account) -> int:
    """Peak memory of a compiled program, from XLA's memory analysis."""
    return (
        account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes
    )


def with_activations(sizes: Sizes, account) -> Sizes:
    """Adds the activations, which are the rest of XLA's allocation, to an update's sizes."""
    rest = total_bytes(account) - sizes.total
    # Gradients that are consumed one by one never exist at the same time.
    return dataclasses.replace(
        sizes, gradients=sizes.gradients + min(rest, 0), activations=max(rest, 0)
    )


def largest_batch(loader, steps: int, trainer=None, state=None):
    """The largest batch among the first `steps` of the first epoch; None: it is not known.

    That is the one with most tokens or the one with the longest row.

    Args:
      trainer, state: make the update's batch of the loader's; None: they are the same.
    """
    if not isinstance(loader, DataLoader):
        return None
    B = loader.batch_size
    lengths = loader.row_lengths(loader.order(0)[: steps * B])
    padded = np.pad(lengths, (0, -len(lengths) % B)).reshape(-1, B)
    chosen = {int(padded.sum(axis=1).argmax()), int(padded.max(axis=1).argmax())}
    items = [next(loader.batches(0, position)) for position in sorted(chosen)]
    batches = [item if trainer is None else first_update(trainer, state, item) for item in items]
    return max(batches, key=lambda batch: batch["input_ids"].size)


def first_update(trainer, state, item):
    """The batch of the first update that a trainer makes of a loader's item."""
    given = next(iter(trainer.make_batches(state, item)))
    return given.batch if isinstance(given, LoggedBatch) else given


def rows_of(batch) -> tuple[int, int]:
    """Number of rows and tokens per row; each completion of a prompt counts as a row."""
    fields = getattr(batch, "tokens", batch)  # PPO's `Experience` has `tokens`
    if "input_ids" in fields:
        return fields["input_ids"].shape
    rows, per_prompt, length = fields["completion_ids"].shape
    return rows * per_prompt, fields["prompt_ids"].shape[1] + length


def capacity(held: int = 0) -> Capacity:
    """The memory of the default device.

    Args:
      held: bytes of this run's existing arrays.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        free = None if limit is None else limit - stats.get("bytes_in_use", 0) + held
        return Capacity(limit, free, device.device_kind)
    totals, frees = (
        [n for n in numbers if n is not None] for numbers in zip(*_host_memory(), strict=True)
    )
    devices = 1 if parallel.layout() is None else jax.local_device_count()  # share it
    return Capacity(
        min(totals) // devices if totals else None,
        min(frees) // devices + held if frees else None,
        device.device_kind,
    )


def _host_memory() -> Iterator[tuple[int | None, int | None]]:
    """Yields (total, free) of the machine and of every control group of this process."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        yield None, None
        return
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    swap = kilobytes.get("SwapTotal", 0)
    yield 1024 * (kilobytes["MemTotal"] + swap), 1024 * kilobytes.get("MemAvailable", 0)
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        names = names if controllers else ("memory.max", "memory.current")
        group = Path(os.path.normpath(path)).relative_to("/")
        for directory in (group, *group.parents):
            limit, used = (_number(root / directory / name) for name in names)
            if limit is not None:
                yield limit, None if used is None else max(limit - used, 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    text = "".join(_lines(file))
    return int(text) if text.isdigit() else None  # "max": no limit


def table(sizes: Sizes, capacity: Capacity, rows: tuple[int, int]) -> str:
    """The memory table that a run prints before its first update, for batches of rows x tokens."""
    parts = {
        "parameters": sizes.parameters,
        "frozen weights": sizes.frozen,
        "gradients": sizes.gradients,
        "optimizer state": sizes.optimizer,
        "activations": sizes.activations,
    }
    width = 16
    lines = [f"  {name:{width}} {format_bytes(n):>10}" for name, n in parts.items() if n]
    have = (
        "" if capacity.total is None else f" of {format_bytes(capacity.total)} on {capacity.name}"
    )
    free = "" if capacity.free is None else f", {format_bytes(capacity.free)} free"
    lines.append(f"  {'together':{width}} {format_bytes(sizes.total):>10}{have}{free}")
    if sizes.host:
        lines.append(f"  {'on the host':{width}} {format_bytes(sizes.host):>10}")
    return "\n".join([f"memory of an update of {rows[0]} x {rows[1]} tokens", *lines])
