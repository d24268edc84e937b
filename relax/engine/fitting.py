"""The flags that make a run fit into memory, found by compiling its update with them.

Nothing is allocated: every candidate is compiled from shapes, and XLA tells its memory.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax

from relax import parallel
from relax.config import TrainerConfig
from relax.config.text import format_bytes
from relax.engine import memory
from relax.engine.model_source import adapters_of
from relax.engine.schedule import make_optimizer
from relax.errors import ConfigError
from relax.models import Transformer
from relax.models.quantization import quantize_linear
from relax.trainers.state import fresh_params

Fields = dict[str, Any]
_STEPS = 1_000_000  # of the schedule, which does not matter here


def cheapest(
    trainer, config: TrainerConfig, batch, most: float, say: Callable[[str], None]
) -> str | None:
    """A sentence with the cheapest flags whose compiled update needs at most `most` bytes.

    Flags are added one by one, in the order of `steps`, until the update fits. Then every one but
    the last is left out again if it fits without. Each trial compiles the update once and is
    reported by `say`; there are at most twice as many as steps.

    Args:
      trainer: the run's, which stays as it is.
      batch: the batch of an update, or its shapes.

    Returns:
      The sentence; None for trainers with two models that are trained, which are not compiled.
    """
    if not isinstance(trainer.model, Transformer) or config.algorithm == "ppo":
        return None
    say("looking for flags that make the update fit; each trial compiles it once")
    chosen: list[Fields] = []
    size = 0
    for step in steps(config):
        trial = [*chosen, step]
        found = _needed(trainer, config, trial, batch, say)
        if found is None:
            continue
        chosen, size = [one for one in chosen if not set(one) <= set(step)] + [step], found
        if size <= most:
            break
    else:
        tried = f"Even {flags(merged(chosen))} needs {format_bytes(size)}" if chosen else "No flag"
        return f"{tried}: use a smaller model, a lower --max_length or a larger device."
    for step in chosen[:-1]:
        fewer = [one for one in chosen if one is not step]
        found = _needed(trainer, config, fewer, batch, say)
        if found is not None and found <= most:
            chosen, size = fewer, found
    text = flags(_per_device(merged(chosen)))
    return f"These flags make it fit, with {format_bytes(size)} by the compiled update: {text}."


def steps(config: TrainerConfig) -> Iterator[Fields]:
    """What to change, first what leaves the result as it is."""
    values = config.flat()
    if not values["gradient_checkpointing"]:
        yield {"gradient_checkpointing": True}
    policies = ["matmuls", "attention", "nothing"]
    now = values["gradient_checkpointing_policy"]
    for policy in policies[policies.index(now) + 1 :] if now in policies else ():
        yield {"gradient_checkpointing_policy": policy}
    yield from _smaller_batches(config.algorithm, values)
    kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    if parallel.platform() != "cpu" and "pinned_host" in kinds and not values["offload_optimizer"]:
        yield {"offload_optimizer": True}
    if values["optim"] == "adamw":
        yield {"optim": "adamw_8bit"}
    if values["dtype"] != "bfloat16":
        yield {"dtype": "bfloat16"}
    if values["freeze"] is None:
        if not values["use_peft"]:
            yield {"use_peft": True}
        if values["model_name_or_path"] is not None and config.algorithm != "reward":
            kinds = ["int8", "nf4"]
            now = values["quantize_base"]
            for kind in kinds[kinds.index(now) + 1 :] if now else kinds:
                yield {"use_peft": True, "quantize_base": kind}


def _smaller_batches(algorithm: str, values: dict) -> Iterator[Fields]:
    """Half of the rows at a time, and so on; only of SFT are all batches cut by rows."""
    rows, count = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    while algorithm == "sft" and rows % (2 * parallel.batch_shards()) == 0:
        rows, count = rows // 2, 2 * count
        yield {"per_device_train_batch_size": rows, "gradient_accumulation_steps": count}


def merged(chosen: list[Fields]) -> Fields:
    """All changes together; later ones win."""
    return {name: value for one in chosen for name, value in one.items()}


def flags(fields: Fields) -> str:
    """The flags of the command line.

    >>> flags({"use_peft": True, "optim": "adamw_8bit"})
    '--use_peft --optim adamw_8bit'
    """
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in fields.items()
    )


def _per_device(fields: Fields) -> Fields:
    rows = fields.get("per_device_train_batch_size")
    shards = parallel.batch_shards()
    return fields if rows is None else fields | {"per_device_train_batch_size": rows // shards}


def _needed(trainer, config, chosen: list[Fields], batch, say) -> int | None:
    """Bytes of the update with some changes; None if the run cannot be made with them."""
    fields = merged(chosen)
    try:
        changed = config.replace(**fields)
        state_of, changed_trainer = _with(trainer, changed)
        state = parallel.sharded_shapes(jax.eval_shape(state_of, jax.random.key(0)))
        size = memory.update_sizes(changed_trainer, state, batch).total
    except (ConfigError, ValueError, jax.errors.JaxRuntimeError) as error:
        say(f"  {flags(_per_device(fields))}: {str(error).splitlines()[0]}")
        return None
    say(f"  {flags(_per_device(fields))}: {format_bytes(size)}")
    return size


def _with(trainer, config: TrainerConfig):
    """What makes the first state, for its shapes, and the trainer with other options."""
    h, other = config.hyperparams, copy.copy(trainer)
    model = trainer.model
    lora = model.lora
    if config.peft.use_peft and lora is None:
        lora = adapters_of(config)
    other.model = model.clone(
        dtype=jax.numpy.dtype(config.model.dtype),
        gradient_checkpointing=h.gradient_checkpointing,
        gradient_checkpointing_policy=h.gradient_checkpointing_policy,
        lora=lora,
    )
    other.optimizer = make_optimizer(config, _STEPS)
    other.gradient_accumulation_steps = h.gradient_accumulation_steps
    other.params = None
    other.train_step = jax.jit(other.update, donate_argnums=0)

    def first_state(key):
        if config.peft.quantize_base:
            plain = other.model.clone(lora=None)
            other.params = quantize_linear(fresh_params(plain, key), config.peft.quantize_base)
        return other.create_train_state(key)

    return first_state, other
