"""The configuration of `relax plan`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from relax.config.mesh import parse_mesh
from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values, needs
from relax.config.schema import CheckpointingPolicy, Dtype, Optimizer
from relax.config.settings import Settings
from relax.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class PlanModelConfig:
    """Model and precision; no weights are read."""

    model_name_or_path: str | None = option(None, "Model directory, or the path of a config.json.")
    dtype: Dtype = option("bfloat16", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")


@dataclass(slots=True, kw_only=True)
class DevicesConfig:
    """Devices and mesh."""

    topology: str = option(
        "cpu:8", "TPU topology, such as v5e:4x4 or v5p:4x4x4; cpu:N = N host devices."
    )
    mesh: str = option(
        "auto", "Devices per mesh axis, such as data=2,fsdp=4,tensor=2; auto = all along fsdp."
    )
    sharding_rules: str | None = option(
        None, "File of sharding rules that precede the built-in ones."
    )


@dataclass(slots=True, kw_only=True)
class StepsConfig:
    """Shapes of the compiled steps."""

    per_device_train_batch_size: int = option(1, "Rows per device along data and fsdp.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Forward-backward passes per step.", at_least=1)
    max_length: int = option(4096, "Tokens per row, and length of the KV cache.", at_least=16)
    optim: Optimizer = option("adamw", "Optimizer.")
    offload_optimizer: bool = option(False, "Keep the optimizer's state in the host's memory.")
    use_peft: bool = option(False, "Train adapters on all linear layers; the rest is frozen.")
    lora_r: int = option(16, "LoRA rank.", at_least=1)
    quantize_base: Literal["nf4", "int8"] | None = option(
        None, "Hold the frozen linear layers in 4 or 8 bits."
    )
    gradient_checkpointing_policy: CheckpointingPolicy = option(
        "nothing",
        "Activations kept by gradient checkpointing: outputs of all matrix products, of "
        "attention only, or none.",
    )
    slots: int = option(
        8,
        "Completions per device along data and fsdp in the decode step; 0 = no decode step.",
        at_least=0,
    )
    quick: bool = option(
        False,
        "Compile with fewer optimisations: several times faster, but overestimates memory and "
        "traffic.",
    )
    full_depth: bool = option(
        False, "Compile all layers; false = extrapolate from two small depths."
    )


def count_of(topology: str) -> int:
    """Number of devices of a topology.

    Raises:
      ConfigError: the text is no topology.

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


def _problems(v: Values) -> Iterator[str]:
    if v["model_name_or_path"] is None:
        yield "model_name_or_path must name a model or its config.json, got none"
    try:
        parse_mesh(v["mesh"], count_of(v["topology"]))
    except ConfigError as error:
        yield str(error)


NO_EFFECT = (
    NoEffect(
        "quick",
        lambda v: v["topology"].startswith("cpu:"),
        "it is for the TPU compiler; omit it for cpu:N",
    ),
    needs("lora_r quantize_base", "use_peft"),
)


@dataclass(slots=True, kw_only=True)
class PlanConfig(Settings):
    """Estimate the memory and traffic of a model on absent devices."""

    algorithm: ClassVar[str] = "plan"
    examples: ClassVar[tuple[str, ...]] = (
        "--model_name_or_path DIR --topology v5e:4x4 --mesh fsdp=16",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)
    no_effect: ClassVar[tuple[NoEffect, ...]] = NO_EFFECT

    model: PlanModelConfig = section(PlanModelConfig)
    devices: DevicesConfig = section(DevicesConfig)
    steps: StepsConfig = section(StepsConfig)
