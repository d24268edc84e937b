"""Memory check of an update: an error with the flags that lower its memory."""

import math

from relax.config import TrainerConfig
from relax.config.text import format_bytes
from relax.engine.memory import Capacity, Sizes
from relax.errors import ConfigError

MARGIN = 1.05  # allowance for fragmentation, which an accelerator's own figures ignore

# Flags in the order to try them: those that do not change the result come first.
# (flag, field, value at which the flag is used up, part of the memory that it lowers)
FLAGS = (
    ("--gradient_checkpointing true", "gradient_checkpointing", True),
    (
        "a lower --per_device_train_batch_size with as much more --gradient_accumulation_steps",
        "per_device_train_batch_size",
        1,
    ),
    ("--dtype bfloat16", "dtype", "bfloat16"),
    ("--use_peft", "use_peft", True),
    ("--quantize_base nf4", "quantize_base", "nf4"),
    ("--optim adamw_8bit", "optim", "adamw_8bit"),
    ("--param_dtype bfloat16", "param_dtype", "bfloat16"),
    ("a lower --max_length", "max_length", None),
)


def check(sizes: Sizes, capacity: Capacity, config: TrainerConfig) -> str | None:
    """Raises an error if an update cannot fit in memory.

    Args:
      sizes: memory that the update needs; a lower bound if the activations are unknown.
      capacity: the available memory.
      config: the run's configuration, to suggest flags that are not used yet.

    Returns:
      A warning if it fits only when other processes free memory; None if it fits.

    Raises:
      ConfigError: it needs more than the device has.
    """
    needs = format_bytes(sizes.total)
    if sizes.total > most_bytes(capacity):
        least = "" if sizes.activations else "at least "
        raise ConfigError(
            f"an update needs {least}{needs}, and {capacity.name} has "
            f"{format_bytes(capacity.total or 0)}. {advice(config)}"
        )
    if capacity.free is not None and sizes.total > capacity.free:
        return (
            f"an update needs {needs}, and {format_bytes(capacity.free)} are free. If memory runs "
            f"out: {advice(config)}"
        )
    return None


def most_bytes(capacity: Capacity) -> float:
    """The most that an update may need: what the device has, with `MARGIN` unless it is a CPU."""
    if capacity.total is None:
        return math.inf
    return capacity.total * (1 if capacity.name == "cpu" else MARGIN)


def advice(config: TrainerConfig) -> str:
    """A sentence with the flags that lower the memory of an update and are not set yet.

    >>> from relax.config import SFTConfig
    >>> advice(SFTConfig().replace(optim="sgd", use_peft=True, gradient_checkpointing=True,
    ...     dtype="bfloat16", max_length=None, per_device_train_batch_size=1))
    'These lower it, in this order: --param_dtype bfloat16; --dry_run shows the table.'
    """
    values = config.flat()
    left = [flag for flag, field, reached in FLAGS if values.get(field, reached) != reached]
    if values["optim"] in ("sgd", "adafactor"):  # their state is smaller still
        left.remove("--optim adamw_8bit")
    if values["freeze"] is not None:  # adapters and frozen weights exclude each other
        left = [flag for flag in left if flag not in ("--use_peft", "--quantize_base nf4")]
    if values["model_name_or_path"] is None and "--quantize_base nf4" in left:
        left.remove("--quantize_base nf4")  # the demo model is not read
    if not left:
        return "No flag lowers it: use a smaller model or a larger device."
    return f"These lower it, in this order: {', '.join(left)}; --dry_run shows the table."
