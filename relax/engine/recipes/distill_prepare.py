"""`relax distill prepare`: a teacher's most likely tokens for all completions, stored once."""

import jax
import numpy as np
import optax

from relax.callbacks.progress import working
from relax.config import DistillConfig
from relax.config.text import format_bytes
from relax.data.distillation import DistillationLoader, DistillationRows
from relax.data.top_logprobs import check_room, needed_bytes, write_index, write_set
from relax.engine.recipes import rl
from relax.engine.recipes.distill import (
    find_teachers,
    load_teachers,
    read_distill_data,
    stored_facts,
)
from relax.engine.run import Run
from relax.errors import ConfigError
from relax.sampling import SamplingConfig
from relax.trainers import DistillationTrainer


def prepare_logprobs(config: DistillConfig, train_rows=None, eval_rows=None, **where) -> None:
    """Stores the log-probabilities that a run with the same configuration reads.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.

    Raises:
      RelaxError: a problem with the configuration, the data, the model or the disk.
    """
    directory, k = config.distill.teacher_logprobs, config.distill.loss_top_k
    if directory is None:
        raise ConfigError("relax distill prepare needs a directory: give --teacher_logprobs DIR.")
    # A dry run writes nothing to output_dir, which belongs to the run that reads the files.
    now = config.replace(dry_run=True, teacher_logprobs=None)
    with Run(now, train_rows, eval_rows, **where) as run:
        tokenizer = run.load_tokenizer()
        model, params = run.load_model()
        sources = run.attempt(find_teachers, now, tokenizer)
        rewards = rl.load_rewards(run, tokenizer)
        parts = {"rewards": rewards, "teachers": sources}
        data = run.load_data(read_distill_data, tokenizer, model, kind="completions", **parts)
        nbytes = sum(needed_bytes(rows.labelled, k) for rows in data.rows.values())
        told = f"{format_bytes(nbytes)} of log-probabilities, {k} tokens each, in {directory}"
        run.console.print(told, markup=False)
        check_room(directory, nbytes)
        trainer = DistillationTrainer(
            model,
            optax.identity(),
            params=params,
            teachers=load_teachers(run, sources, model, tokenizer),
            tokenizer=tokenizer,
            lmbda=0.0,
            sampling=SamplingConfig(temperature=config.rollout.temperature),
            loss_chunk_size=config.distill.loss_chunk_size,
        )
        state = trainer.create_train_state(jax.random.key(config.hyperparams.seed))
        entries = {}
        size = config.inference.per_device_eval_batch_size
        for name, rows in data.rows.items():
            with working(run.console, f"computing the teacher on the {name}") as report:
                arrays = _arrays_of(trainer, state, rows, size, k, report)
            entries[name] = write_set(directory, name, rows.labelled, arrays)
        write_index(directory, stored_facts(config), entries)
        run.console.print("done: run relax distill with the same flags", markup=False)


def _arrays_of(trainer, state, rows: DistillationRows, size: int, k: int, report) -> list:
    """The two arrays of a set, see `relax.data.top_logprobs`."""
    loader = DistillationLoader(rows, size, shuffle=False, keep_last=True)
    found: tuple[list, list] = ([], [])
    for number, item in enumerate(loader):
        columns = trainer.teacher_logprobs(state, item, k)
        for some, parts in zip(found, columns.values(), strict=True):
            some += parts
        report(f"{number + 1} of {len(loader)} batches")
    return [np.concatenate(parts) for parts in found]
