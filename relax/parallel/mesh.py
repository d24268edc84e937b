"""The active mesh, with axes `data`, `fsdp` and `tensor`, and its sharding rules."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AxisType, Mesh

from relax.config.mesh import AXES, mesh_text, parse_mesh
from relax.parallel.rules import RULES, Rule

BATCH = ("data", "fsdp")  # axes over which rows are sharded


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its sharding rules.

    Attributes:
      mesh: a mesh of devices with the axes `AXES`.
      rules: sharding rules of weights, see `relax.parallel.rules`.
      heads: key-value heads of the model; None: unknown, so any divisible matrix is sharded.
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES
    heads: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch's rows."""
        return self.sizes["data"] * self.sizes["fsdp"]

    def describe(self) -> list[str]:
        """Lines about the mesh, and about weights that it cannot shard."""
        platform = self.mesh.devices.flat[0].device_kind
        processes = len({device.process_index for device in self.mesh.devices.flat})
        lines = [
            f"mesh: {mesh_text(self.sizes)} on {self.mesh.size} x {platform}"
            + (f" of {processes} processes" if processes > 1 else "")
        ]
        tensor = self.sizes["tensor"]
        if self.heads and self.heads % tensor:
            lines.append(
                f"mesh: {self.heads} key-value heads cannot be divided by tensor={tensor}: "
                "attention and its weights are replicated along tensor"
            )
        return lines


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def make_mesh(text: str, devices: Sequence | None = None) -> Mesh:
    """Makes the mesh described by `data=2,fsdp=4,tensor=1` or `auto`.

    Args:
      text: see `relax.config.mesh.parse_mesh`.
      devices: the devices to use; None: all.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


@contextlib.contextmanager
def use(
    mesh: Mesh | None, rules: Sequence[Rule] = RULES, heads: int | None = None
) -> Iterator[Layout | None]:
    """Context in which arrays and compiled functions use a mesh; None: one device.

    Args:
      mesh: a result of `make_mesh`.
      rules: sharding rules of weights; the last one must match everything.
      heads: key-value heads of the model, so that only whole heads are sharded.
    """
    chosen = None if mesh is None else Layout(mesh, tuple(rules), heads)
    token = _current.set(chosen)
    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            yield chosen
    finally:
        _current.reset(token)


def layout() -> Layout | None:
    """The active layout; None without a mesh, and within `per_device`."""
    current = _current.get()
    if current is None or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    return current


def batch_shards() -> int:
    """How many parts the rows of a batch are cut into; 1 without a mesh."""
    current = _current.get()
    return 1 if current is None else current.batch_shards


def platform() -> str:
    """The platform of the devices that programs are compiled for."""
    current = _current.get()
    if current is None:
        return jax.default_backend()
    return current.mesh.devices.flat[0].platform
