"""Refuses an update that needs more memory than there is, and names the flags that lower it."""

from relax.config import TrainerConfig
from relax.config.text import format_bytes
from relax.engine.memory import Capacity, Sizes
from relax.errors import ConfigError

MARGIN = 1.05  # an accelerator's own account of a program is exact but for fragmentation

# Flags in the order to try them: those that leave the result as it is come first.
# (flag, field, the value that has been reached, which part it lowers)
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
    """Refuses an update that cannot fit.

    Args:
      sizes: what the update needs, or at least needs where the activations are not known.
      capacity: the memory there is.
      config: of the run, for the flags that are left to try.

    Returns:
      A warning where it fits only if others make room; None: it fits.

    Raises:
      ConfigError: it needs more than there is.
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
            f"an update needs {needs}, and {format_bytes(capacity.free)} are free. Should memory "
            f"run out: {advice(config)}"
        )
    return None


def advice(config: TrainerConfig) -> str:
    """One sentence with the flags that lower the memory of an update and are not set yet.

    >>> from relax.config import SFTConfig
    >>> advice(SFTConfig().replace(optim="sgd", use_peft=True, gradient_checkpointing=True,
    ...     dtype="bfloat16", max_length=None, per_device_train_batch_size=1))
    'These lower it, in this order: --param_dtype bfloat16; --dry_run shows the table.'
    """
    values = config.flat()
    small = {"optim": ("adafactor", "sgd"), "use_peft": (True, values.get("freeze") is not None)}
    left = [
        flag
        for flag, field, reached in FLAGS
        if field in values and values[field] not in (reached, *small.get(field, ()))
    ]
    if not left:
        return "No flag lowers it: take a smaller model or a larger device."
    return f"These lower it, in this order: {', '.join(left)}; --dry_run shows the table."
