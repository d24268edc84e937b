"""The configuration of `python -m relax.parallel plan`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.mesh import parse_mesh
from relax.config.options import option, section
from relax.config.schema import Dtype, Optimizer, Settings
from relax.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class PlanModelConfig:
    """Which model is planned for; no weights are read."""

    model_name_or_path: str | None = option(
        None, "Model directory, or a config.json by whatever name."
    )
    dtype: Dtype = option("bfloat16", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")


@dataclass(slots=True, kw_only=True)
class DevicesConfig:
    """Which devices, and how they are shared out."""

    topology: str = option("cpu:8", "Such as v5e:4x4 or v5p:4x4x4; cpu:N = N forced host devices.")
    mesh: str = option("auto", "Devices per axis, such as data=2,fsdp=4,tensor=2.")
    sharding_rules: str | None = option(
        None, "File of rules of how weights are cut, before the built-in ones."
    )


@dataclass(slots=True, kw_only=True)
class StepsConfig:
    """The steps that are compiled."""

    per_device_train_batch_size: int = option(
        1, "Rows per device along data and fsdp, of an update.", at_least=1
    )
    gradient_accumulation_steps: int = option(1, "Passes summed into one update.", at_least=1)
    max_length: int = option(4096, "Tokens of a row, and columns of the cache.", at_least=16)
    optim: Optimizer = option("adamw", "What makes updates of gradients.")
    gradient_checkpointing_policy: Literal["matmuls", "attention", "nothing"] = option(
        "nothing", "What is not recomputed: matrix products and attention, attention, nothing."
    )
    slots: int = option(
        8, "Completions per device along data and fsdp in a decode step.", at_least=1
    )
    quick: bool = option(
        False,
        "Let the TPU compiler optimise less: several times faster; tells more memory and bytes.",
    )
    full_depth: bool = option(
        False, "Compile all layers; false = two small depths, from which the rest follows."
    )


@dataclass(slots=True, kw_only=True)
class PlanConfig(Settings):
    """Compiles an update and a decode step for devices that need not be there."""

    algorithm: ClassVar[str] = "plan"

    model: PlanModelConfig = section(PlanModelConfig)
    devices: DevicesConfig = section(DevicesConfig)
    steps: StepsConfig = section(StepsConfig)

    def problems(self) -> list[str]:
        return Settings.problems(self) or list(_problems(self.flat()))


def count_of(topology: str) -> int:
    """Devices of a topology.

    Raises:
      ConfigError: it is none.

    >>> count_of("v5e:4x4"), count_of("cpu:8")
    (16, 8)
    """
    name, _, sizes = topology.partition(":")
    count = 1
    for size in sizes.split("x"):
        if not name or not size.isdecimal() or not int(size):
            raise ConfigError(f"topology must be such as v5e:4x4 or cpu:8, got {topology!r}.")
        count *= int(size)
    return count


def _problems(values: dict[str, Any]) -> Iterator[str]:
    if values["model_name_or_path"] is None:
        yield "model_name_or_path must name a model or its config.json, got none"
    if values["quick"] and values["topology"].startswith("cpu:"):
        yield "quick has no effect: it is for the compiler of TPUs; leave it out for cpu:N"
    try:
        parse_mesh(values["mesh"], count_of(values["topology"]))
    except ConfigError as error:
        yield str(error)
