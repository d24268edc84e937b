"""What is checked before a job's first update: its parts against each other and the machine."""

import dataclasses
from pathlib import Path

import jax

from relax import parallel
from relax.checkpoint.checkpointer import check_space, tree_bytes
from relax.config import ConfigLoader, TrainerConfig
from relax.config.watch_rules import keeps_best
from relax.engine import advice, devices, memory, model_source
from relax.engine.resume import check_same_config
from relax.errors import DataError, ErrorList, RelaxError
from relax.models import TransformerConfig
from relax.models.trainable import merge


def changed_fields(config: TrainerConfig, old_run: Path) -> list[str]:
    """What differs, and may, from the configuration of the run that is gone on with.

    Raises:
      ConfigError: something differs that may not.
    """
    file = old_run / "config.json"
    if not file.exists():
        return []
    old = ConfigLoader(file, type(config)).load().flat()
    old, new = (devices.global_batch_fields(fields) for fields in (old, config.flat()))
    return check_same_config(old, new, config.output.allow_config_change)


def read_datasets(recipe, tokenizer, shape: TransformerConfig, rows, found: ErrorList):
    """The data of a job, checked against its model; None where something is wrong with it.

    Where it is, the rows are looked at again as if for a model that takes any token, any length,
    and both, so that one problem does not hide the next.

    Args:
      rows: as for `Recipe.datasets`.
      found: where problems are noted.
    """
    with found.catch():
        check_tokens(recipe.config, tokenizer, shape)
    try:
        return recipe.datasets(tokenizer, shape, rows)
    except RelaxError as error:
        found.note(error)
    vocabulary, positions = {"vocab_size": 2**31 - 1}, {"max_position_embeddings": 2**31 - 1}
    for limits in (vocabulary, positions, vocabulary | positions):
        with found.catch():
            recipe.datasets(tokenizer, dataclasses.replace(shape, **limits), rows)
    return None


def check_tokens(config: TrainerConfig, tokenizer, shape: TransformerConfig) -> None:
    """Refuses tokens that begin or end a text and are no tokens of the model.

    Raises:
      DataError: names them.
    """
    ends = model_source.end_tokens(config.model.model_name_or_path, tokenizer)
    ids = {*ends, tokenizer.bos_token_id} - {None}
    wrong = sorted(i for i in ids if not 0 <= i < shape.vocab_size)
    if wrong:
        raise DataError(
            f"tokens that begin or end a text must be of the {shape.vocab_size} of the model, got "
            f"{', '.join(f'{i} ({tokenizer.convert_ids_to_tokens(i)!r})' for i in wrong)}: is the "
            "tokenizer this model's?"
        )


def check_state_memory(config: TrainerConfig, trainer) -> None:
    """Refuses a state that cannot fit, before it is made.

    Raises:
      ConfigError: with the flag that makes it fit by estimate.
    """
    state = jax.eval_shape(trainer.create_train_state, jax.random.key(0))
    state = parallel.sharded_shapes(state)
    sizes = memory.state_sizes(state, trainer.gradient_accumulation_steps)
    advice.check(sizes, memory.capacity(), advice.advice_for(config, trainer, state))


def check_update_memory(config: TrainerConfig, trainer, state, batch, console) -> memory.Sizes:
    """Compiles the update, shows what it needs, and refuses it where that is more than there is.

    Args:
      batch: the largest one, or its shapes.

    Raises:
      ConfigError: with the flag that makes it fit by estimate.
    """
    there = memory.capacity(parallel.bytes_per_device(state))
    sizes = memory.update_sizes(trainer, state, batch)
    console.print(memory.table(sizes, there, memory.rows_of(batch)), markup=False)
    warning = advice.check(sizes, there, advice.advice_for(config, trainer, state, batch))
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
    """Room for the checkpoints that will exist at once, and for the model directory.

    Args:
      directory: where they go.
      save_interval: updates between checkpoints; None or 0: one, at the end.
      saved_steps: checkpoints that a run that is gone on with has on the disk already.
      only_trained: checkpoints hold no frozen weights.
      only_adapter: what is exported is an adapter.

    Returns:
      Checkpoints that will exist at once, bytes of one, and bytes of the model directory.

    Raises:
      CheckpointError: there is not enough.
    """
    output, copies = config.output, 0
    if output.save_strategy != "no":
        copies = 1 + (steps // save_interval if save_interval else 0)
        if output.save_total_limit is not None:
            copies = min(copies, output.save_total_limit + 1)
        copies = max(copies - saved_steps, 1)
    copies += 2 * keeps_best(config.flat())  # the best state, and the one that takes its place
    checkpoint = tree_bytes(state.replace(frozen={}) if only_trained else state)
    model = tree_bytes(state.params if only_adapter else merge(state.params, state.frozen))
    check_space(directory, checkpoint, copies, others=model)
    return copies, checkpoint, model
