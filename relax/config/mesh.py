"""Mesh sizes in the syntax of `--mesh`. Imports no jax.

`data` and `fsdp` shard the rows of a batch, `fsdp` also the weights, and `tensor` the columns of
matrices and the heads.
"""

import math

from relax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
AUTO = "auto"


def parse_mesh(text: str, devices: int | None = None) -> dict[str, int]:
    """Parses the number of devices along each axis.

    Args:
      text: `data=2,fsdp=4`, where omitted axes are 1; or `auto`: all devices along fsdp.
      devices: number of devices, the product of the sizes; None: not known yet.

    Returns:
      Sizes in the order of `AXES`; {} for `auto` where `devices` is None.

    Raises:
      ConfigError: the text is neither, or the axes do not multiply to `devices`.

    >>> parse_mesh("fsdp=4,data=2"), parse_mesh("auto", 8)
    ({'data': 2, 'fsdp': 4, 'tensor': 1}, {'data': 1, 'fsdp': 8, 'tensor': 1})
    """
    if text == AUTO:
        return {} if devices is None else {"data": 1, "fsdp": devices, "tensor": 1}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"mesh must be {AUTO} or sizes of {', '.join(AXES)}, each at most once and at "
                f"least 1, such as data=2,fsdp=4, got {text!r}."
            )
        sizes[name] = int(size)
    sizes = {name: sizes.get(name, 1) for name in AXES}
    if devices is not None and math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"the axes of a mesh must multiply to the number of devices, got {mesh_text(sizes)} "
            f"for {devices}. Pass --mesh {AUTO}, or other sizes."
        )
    return sizes


def mesh_text(sizes: dict[str, int]) -> str:
    """The text of a mesh, which `parse_mesh` reads.

    >>> mesh_text({"data": 2, "fsdp": 4, "tensor": 1})
    'data=2,fsdp=4,tensor=1'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())
