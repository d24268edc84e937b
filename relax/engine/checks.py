"""Checks before the first update: configuration, data, memory and disk space."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from relax import parallel
from relax.checkpoint.checkpointer import check_space, tree_bytes
from relax.config import ConfigLoader, TrainerConfig
from relax.config.watch_rules import keeps_best
from relax.engine import advice, devices, fitting, memory
from relax.engine.output import warn_unchecked
from relax.engine.resume import check_same_config
from relax.errors import ConfigError, ErrorList, RelaxError
from relax.models import TransformerConfig
from relax.models.quantization import is_quantized
from relax.models.trainable import merge


def changed_fields(config: TrainerConfig, old_run: Path) -> list[str]:
    """Lists the permitted differences from the configuration of the resumed run.

    Raises:
      ConfigError: a field differs that must not, or the configuration cannot be read.
    """
    file = old_run / "config.json"
    if not file.exists():
        warn_unchecked(file, "configuration")
        return []
    try:
        old = ConfigLoader(file, type(config)).load().flat()
    except ConfigError as error:
        raise ConfigError(
            f"the configuration of the run to resume cannot be read: {error}. Restore the file, or "
            "remove it and pass the flags of the run with --resume auto."
        ) from error
    old, new = (devices.global_batch_fields(fields) for fields in (old, config.flat()))
    return check_same_config(old, new, config.output.allow_config_change)


def read_data(read: Callable, model_config: TransformerConfig, found: ErrorList):
    """Reads the data of a run, checked against its model; None if there is a problem.

    In that case the rows are read again as if the model accepted any token, any length, and both,
    so that one problem does not hide the next.

    Args:
      read: reads the data for `model_config`.
      found: collects the problems.
    """
    try:
        return read(model_config=model_config)
    except RelaxError as error:
        found.note(error)
    vocabulary: dict[str, Any] = {"vocab_size": 2**31 - 1}
    positions: dict[str, Any] = {"max_position_embeddings": 2**31 - 1}
    for limits in (vocabulary, positions, vocabulary | positions):
        with found.catch():
            read(model_config=dataclasses.replace(model_config, **limits))
    return None


def check_state_memory(config: TrainerConfig, trainer, data, steps: int, console) -> None:
    """Raises an error if the state cannot fit in memory, before it is created.

    Args:
      data, steps: of the run, from which the largest batch follows where rows are batches.

    Raises:
      ConfigError: it needs more than the device has; names flags that make it fit.
    """
    state = jax.eval_shape(trainer.create_train_state, jax.random.key(0))
    state = parallel.sharded_shapes(state)
    sizes = memory.state_sizes(state, trainer.gradient_accumulation_steps)
    there = memory.capacity()
    try:
        advice.check(sizes, there, config)
    except ConfigError as error:
        batch = None
        if config.algorithm == "sft":
            batch = memory.largest_batch(data.train, steps, trainer, state)
        raise _with_flags(error, config, trainer, batch, there, console) from None


def _with_flags(error: ConfigError, config, trainer, batch, there: memory.Capacity, console):
    """The error with the flags that make the update fit, in place of a list to try."""
    if batch is None or there.total is None:
        return error
    say = partial(console.print, markup=False)
    found = fitting.cheapest(trainer, config, batch, advice.most_bytes(there), say)
    if found is None:
        return error
    return ConfigError(f"{str(error).removesuffix(advice.advice(config)).strip()} {found}")


def check_update_memory(config: TrainerConfig, trainer, state, batch, console) -> memory.Sizes:
    """Compiles the update, prints the memory it needs, and raises an error if it cannot fit.

    Args:
      batch: the largest batch, or its shapes.

    Raises:
      ConfigError: it needs more than the device has; names flags that make it fit.
    """
    there = memory.capacity(memory.state_sizes(state, 1).held)
    sizes = memory.update_sizes(trainer, state, batch)
    console.print(memory.table(sizes, there, memory.rows_of(batch)), markup=False)
    try:
        warning = advice.check(sizes, there, config)
    except ConfigError as error:
        raise _with_flags(error, config, trainer, batch, there, console) from None
    if warning is not None and sizes.activations:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    return sizes


def check_disk(
    config: TrainerConfig,
    directory: Path,
    state,
    *,
    save_interval: int | None,
    steps: int,
    saved_steps: int,
    only_trained: bool,
    only_adapter: bool,
) -> tuple[int, int, int]:
    """Checks the disk space for all checkpoints that exist at once and for the model directory.

    Args:
      directory: the directory of both.
      save_interval: updates between checkpoints; None or 0: one checkpoint at the end.
      saved_steps: existing checkpoints of a resumed run.
      only_trained: whether checkpoints omit frozen weights.
      only_adapter: whether an adapter is exported instead of a model.

    Returns:
      Number of checkpoints that exist at once, bytes of one, bytes of the model directory.

    Raises:
      ConfigError: there is not enough space.
    """
    output, copies = config.output, 0
    if output.save_strategy != "no":
        copies = 1 + (steps // save_interval if save_interval else 0)
        if output.save_total_limit is not None:
            copies = min(copies, output.save_total_limit + 1)
        copies = max(copies - saved_steps, 1)
    copies += 2 * keeps_best(config.flat())  # the best state and its replacement
    checkpoint = tree_bytes(state.replace(frozen={}) if only_trained else state)
    whole = merge(state.params, state.frozen)
    whole = jax.tree.map(partial(_written, config), whole, is_leaf=is_quantized)
    model = tree_bytes(state.params if only_adapter else whole)
    check_space(directory, checkpoint, copies, others=model)
    return copies, checkpoint, model


def _written(config: TrainerConfig, leaf):
    """What is written of a weight, which is not quantised."""
    if not is_quantized(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, config.model.param_dtype)
