"""A run up to its first update, which is taken and thrown away: what is wrong, what it will need.

Nothing is written: no directory, no checkpoint, no file but what the compilation cache keeps.
"""

import shutil
import time
from typing import Any

import jax
import numpy as np

from relax import parallel
from relax.config.text import format_bytes, format_seconds
from relax.engine import checks, memory, output
from relax.engine.run import Job, JobResult, Parts
from relax.errors import ConfigError, ErrorList, Problems, RelaxError
from relax.trainers.trainer import LoggedBatch


def dry_run(job: Job) -> JobResult:
    """Checks a job, compiles and times its update, and shows what the run will need.

    Returns:
      A result without a state, whose metrics are what was measured: `dry_run/steps`,
      `dry_run/step_s`, `dry_run/memory_bytes`, `dry_run/disk_bytes`.

    Raises:
      Problems: all that is wrong, at once.
    """
    try:
        return _dry_run(job, job.problems)
    except Problems:
        raise
    except RelaxError as error:  # whatever its exit code is in a run
        raise Problems([str(error)]) from error


def _dry_run(job: Job, found: ErrorList) -> JobResult:
    parts, params = job.assemble()
    state, _ = job.start_state(parts.trainer, params)
    params = disk = sizes = None
    with found.catch():
        disk = job.check_disk(state, parts.steps)
    with found.catch():
        job.check_same_data(parts.datasets)
    output.show_plan(job.console, job.config, state, parts.steps, job.recipe.plan)
    try:
        batches = _batches(job, parts, state)
        job.progress.announce(batches[0])
        with found.catch():
            sizes = checks.check_update_memory(
                job.config, parts.trainer, state, batches[0], job.console
            )
        found.raise_all()
        seconds = _time_of_update(job, parts, state, batches)
    except jax.errors.JaxRuntimeError as error:
        found.note(ConfigError(f"the update cannot be computed: {error}"))
        found.raise_all()
    copies, checkpoint, model = disk
    measured = {
        "dry_run/steps": parts.steps,
        "dry_run/step_s": seconds,
        "dry_run/memory_bytes": sizes.total,
        "dry_run/disk_bytes": copies * checkpoint + model,
    }
    for name, text in _lines(job, parts, measured, disk).items():
        job.console.print(f"  {name:10} {text}", markup=False)
    job.console.print("all is well: without --dry_run the run begins")
    return JobResult(None, measured, job.run_dir.path)


def _batches(job: Job, parts: Parts, state) -> list:
    """The batches of one item: the largest there will be, where that is known, or the first."""
    if parts.batch is not None:
        zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in parts.batch.items()}
        return [zeros | {"segment_ids": np.ones_like(zeros["segment_ids"])}]
    item = next(iter(parts.datasets.train.batches(0)))
    given = parts.trainer.make_batches(state, job.recipe.complete(item))
    return [one.batch if isinstance(one, LoggedBatch) else one for one in given]


def _time_of_update(job: Job, parts: Parts, state, batches: list[Any]) -> float:
    """Seconds of one update, with its share of what leads to it, once all of it is compiled."""
    for compiled in (False, True):
        start_s = time.monotonic()
        if compiled:
            batches = _batches(job, parts, state)
        for batch in batches:
            state, metrics = parts.trainer.train_step(state, parallel.shard_batch(batch))
        jax.block_until_ready(metrics)
    return (time.monotonic() - start_s) / len(batches)


def _lines(job: Job, parts: Parts, measured: dict, disk) -> dict[str, str]:
    copies, checkpoint, model = disk
    steps, seconds = measured["dry_run/steps"], measured["dry_run/step_s"]
    reports = {name: report.to_dict() for name, report in parts.datasets.reports.items()}
    data = [
        f"{report.get('num_examples', report['num_rows']):,} rows of {report['num_tokens']:,} "
        f"tokens ({name})"
        for name, report in reports.items()
    ]
    there = memory.capacity()
    have = "" if there.total is None else f" of {format_bytes(there.total)} on {there.name}"
    epochs = steps / parts.updates_per_epoch
    total = format_bytes(copies * checkpoint + model)
    free = format_bytes(shutil.disk_usage(job.run_dir.existing()).free)
    return {
        "data": ", ".join(data),
        "memory": f"{format_bytes(measured['dry_run/memory_bytes'])}{have}",
        "steps": f"{steps:,} updates, {epochs:.3g} epochs of {parts.updates_per_epoch:,}",
        "one step": f"{format_seconds(seconds)}; all of them {format_seconds(seconds * steps)}, "
        "without evaluating and saving",
        "disk": f"{copies} checkpoints of {format_bytes(checkpoint)} and a model of "
        f"{format_bytes(model)}: {total}, with {free} free",
    }
