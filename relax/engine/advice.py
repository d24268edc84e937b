"""Memory check of an update: an error with the flags that lower its memory."""

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
    ("--optim adafactor", "optim", "adafactor"),
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
    is_cpu = capacity.name == "cpu"
    needs = format_bytes(sizes.total)
    if capacity.total is not None and sizes.total > capacity.total * (1 if is_cpu else MARGIN):
        least = "" if sizes.activations else "at least "
        raise ConfigError(
            f"an update needs {least}{needs}, and {capacity.name} has "
            f"{format_bytes(capacity.total)}. {advice(config)}"
        )
    if capacity.free is not None and sizes.total > capacity.free:
        return (
            f"an update needs {needs}, and {format_bytes(capacity.free)} are free. If memory runs "
            f"out: {advice(config)}"
        )
    return None


def advice(config: TrainerConfig) -> str:
    """A sentence with the flags that lower the memory of an update and are not set yet.

    >>> from relax.config import SFTConfig
    >>> advice(SFTConfig().replace(optim="sgd", use_peft=True, gradient_checkpointing=True,
    ...     dtype="bfloat16", max_length=None, per_device_train_batch_size=1))
    'These lower it, in this order: --param_dtype bfloat16; --dry_run shows the table.'
    """
    values = config.flat()
    left = [flag for flag, field, reached in FLAGS if values.get(field, reached) != reached]
    if values["optim"] == "sgd":  # its state is smaller still
        left.remove("--optim adafactor")
    if values["freeze"] is not None:  # adapters and frozen weights exclude each other
        left.remove("--use_peft")
    if not left:
        return "No flag lowers it: use a smaller model or a larger device."
    return f"These lower it, in this order: {', '.join(left)}; --dry_run shows the table."
