"""Dry run: does everything up to the first update, times a few updates and discards them.

Writes no files except those of the compilation cache.
"""

import shutil
import time
from typing import Any

import jax

from relax import parallel
from relax.config.text import format_bytes, format_seconds
from relax.engine import checks, memory, output
from relax.engine.rows import Data
from relax.errors import ConfigError
from relax.trainers.trainer import LoggedBatch


def dry_run(run, trainer, data: Data) -> dict[str, float]:
    """Compiles and times the update of a run; prints its time, memory and disk space.

    Args:
      run: a `Run` whose trainer has been made.

    Returns:
      The measured metrics: `dry_run/steps`, `dry_run/step_s`, `dry_run/memory_bytes`,
      `dry_run/disk_bytes`.

    Raises:
      RelaxError: all problems together.
    """
    found, steps, disk, sizes = run.problems, run.steps(data), None, None
    checks.check_state_memory(run.config, trainer, data, steps, run.console)
    state, _ = run.first_state(trainer)
    with found.catch():
        disk = run.check_disk(state, data)
    with found.catch():
        run.check_same_data(data)
    output.show_plan(run.console, run.config, state, steps, data.plan)
    try:
        batches = _batches(trainer, data, state, steps)
        run.progress.announce(batches[0])
        with found.catch():
            sizes = checks.check_update_memory(run.config, trainer, state, batches[0], run.console)
        found.raise_all()
        seconds = _time_of_update(trainer, data, state, batches, steps)
    except jax.errors.JaxRuntimeError as error:
        found.note(ConfigError(f"the update cannot be computed: {error}"))
        found.raise_all()
    assert disk is not None and sizes is not None  # where one is None there was a problem
    copies, checkpoint, model = disk
    measured = {
        "dry_run/steps": steps,
        "dry_run/step_s": seconds,
        "dry_run/memory_bytes": sizes.total,
        "dry_run/disk_bytes": copies * checkpoint + model,
    }
    free = shutil.disk_usage(run.run_dir.existing()).free
    for name, text in _lines(data, measured, disk, free).items():
        run.console.print(f"  {name:10} {text}", markup=False)
    run.console.print("dry run passed; remove --dry_run to start")
    return measured


def _batches(trainer, data: Data, state, steps: int) -> list:
    """The batches of one item: of the largest if that is known, else of the first."""
    largest = memory.largest_batch(data.train, steps, trainer, state)
    if largest is not None:
        return [largest]
    item = next(iter(data.train.batches(0)))
    given = trainer.make_batches(state, data.fill_batch(item))
    return [one.batch if isinstance(one, LoggedBatch) else one for one in given]


def _time_of_update(trainer, data: Data, state, batches: list[Any], steps: int) -> float:
    """Seconds per update after compilation, including its share of making the batches."""
    for is_compiled in (False, True):
        start_s = time.monotonic()
        if is_compiled:
            batches = _batches(trainer, data, state, steps)
        for batch in batches:
            state, metrics = trainer.train_step(state, parallel.shard_batch(batch))
        jax.block_until_ready(metrics)
    return (time.monotonic() - start_s) / len(batches)


def _lines(data: Data, measured: dict, disk, free: int) -> dict[str, str]:
    copies, checkpoint, model = disk
    steps, seconds = measured["dry_run/steps"], measured["dry_run/step_s"]
    reports = {name: report.to_dict() for name, report in data.reports.items()}
    rows = [
        f"{report.get('num_examples', report['num_rows']):,} rows of {report['num_tokens']:,} "
        f"tokens ({name})"
        for name, report in reports.items()
    ]
    capacity = memory.capacity()
    have = ""
    if capacity.total is not None:
        have = f" of {format_bytes(capacity.total)} on {capacity.name}"
    epochs = steps / data.updates_per_epoch
    total = format_bytes(copies * checkpoint + model)
    return {
        "data": ", ".join(rows),
        "memory": f"{format_bytes(measured['dry_run/memory_bytes'])}{have}",
        "steps": f"{steps:,} updates, {epochs:.3g} epochs of {data.updates_per_epoch:,}",
        "one step": f"{format_seconds(seconds)}; all steps {format_seconds(seconds * steps)}, "
        "without evaluation and checkpoints",
        "disk": f"{copies} checkpoints of {format_bytes(checkpoint)} and a model of "
        f"{format_bytes(model)}: {total}, with {format_bytes(free)} free",
    }
