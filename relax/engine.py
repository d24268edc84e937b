"""From a configuration to a finished run: data, model, optimizer, training, model directory."""

import contextlib
import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from safetensors import SafetensorError

from relax import assemble, fault, job_checks, job_output, memory
from relax.callbacks import MetricsLog, Progress
from relax.checkpoint import Checkpointer, full_disk, restore_checkpoint
from relax.checkpoint_frozen import FrozenElsewhere
from relax.config import TrainerConfig, resolve_steps
from relax.errors import CheckpointError, ConfigError
from relax.models import kernels
from relax.models.lora import merge_adapters
from relax.models.peft import save_adapter
from relax.models.trainable import merge
from relax.recipes import recipe_of
from relax.run_dir import RunDir
from relax.trainers.interrupt import Interrupt, Interrupted

FROM_PYTHON = "rows from Python"


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What a job leaves.

    Attributes:
      state: the final state.
      metrics: of the last evaluation; for the embedded task `exact_match_before` and
        `exact_match` as well.
      output_dir: the run's directory.
      model_dir: the Hugging Face directory of the trained model, or of its adapter.
    """

    state: Any
    metrics: dict[str, float]
    output_dir: Path
    model_dir: Path


class TrainerEngine:
    """Runs jobs, one after the other.

    Args:
      console: where progress is shown; None: standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)

    def run_job(self, config: TrainerConfig, train_rows=None, eval_rows=None) -> JobResult:
        """Carries out one configuration.

        Args:
          config: of the algorithm to run.
          train_rows, eval_rows: in place of named data: lists of dicts, `datasets` objects or
            other iterables of dicts.

        Raises:
          RelaxError: something about the configuration, the data, the model or the disk.
          Interrupted: Ctrl-C or SIGTERM, after saving; the command that goes on was printed.
        """
        config.validate()
        rows = None
        if train_rows is not None:
            if config.data.dataset_name or config.data.eval_dataset_name:
                raise ConfigError("give rows or dataset_name, not both.")
            # So that config.json does not claim to repeat the run.
            config, rows = config.replace(dataset_name=FROM_PYTHON), (train_rows, eval_rows)
        elif eval_rows is not None:
            raise ConfigError("eval_rows need train_rows: give both, or eval_dataset_name.")
        with contextlib.ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt(grace_s=config.system.grace_s))
            run_dir = stack.enter_context(RunDir(config.output.output_dir))
            if config.debug.debug_nans:
                stack.enter_context(jax.debug_nans(True))
            if config.system.compilation_cache_dir:
                jax.config.update("jax_compilation_cache_dir", config.system.compilation_cache_dir)
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = self._show_warning
            job = _Job(config, run_dir, self.console, rows)
            stack.callback(job.recipe.close)
            try:
                return job.run(interrupt)
            except Interrupted:
                job.show_how_to_go_on()
                raise
            except OSError as error:
                if full_disk(error) is None:
                    raise
                raise CheckpointError(
                    f"the disk is full: {error}. {job.how_to_recover()}"
                ) from error

    def _show_warning(self, message, *_):
        self.console.print(f"warning: {message}", style="yellow", markup=False)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is made of.

    `batch` has the shapes of the largest one, None where batches come to be in the run.
    """

    tokenizer: Any
    model: Any
    datasets: Any
    trainer: Any
    updates_per_epoch: int
    steps: int
    batch: Any


class _Job:
    """One run, from its configuration to its model directory."""

    def __init__(self, config: TrainerConfig, run_dir: RunDir, console: Console, rows=None):
        self.config, self.run_dir, self.console, self.rows = config, run_dir, console, rows
        self.start_s = time.monotonic()
        self.metrics: dict[str, float] = {}
        output = config.output
        self.start = run_dir.prepare(
            output.resume, output.overwrite_output_dir, console.print, clear=False
        )
        self.begun = self.start is not None  # there is a run here that can be resumed
        self.checkpointer = Checkpointer(
            run_dir.checkpoints, save_total_limit=output.save_total_limit, warn=warnings.warn
        )
        self.checkpointer.sweep()
        self.recipe = recipe_of(config, console)
        # A checkpoint then holds what is trained; the rest is had again from where it came from.
        self.freezes = (
            config.peft.use_peft
            or config.peft.freeze is not None
            or self.recipe.has_constant_reference
        )
        self.saver: Checkpointer | FrozenElsewhere = self.checkpointer
        self.base: str | None = None  # what the exported adapter is for, if one is exported

    def run(self, interrupt: Interrupt) -> JobResult:
        config, recipe = self.config, self.recipe
        parts, params = self._assemble()
        trainer, datasets, steps = parts.trainer, parts.datasets, parts.steps
        state, progress = self._start_state(trainer, params)
        params = None  # the state has taken them over, and the first update reuses their memory
        self._begin(parts, state)
        if recipe.embedded and progress is None:
            self.metrics |= recipe.examine("before", trainer, state, datasets)
        if int(state.step) < steps and parts.batch is not None:
            # Of batches that come to be in the run nothing is known yet.
            self.progress.announce(parts.batch)
            job_checks.check_update_memory(config, trainer, state, parts.batch, self.console)
        state = trainer.train(
            datasets.train,
            num_epochs=math.ceil(steps / parts.updates_per_epoch),
            state=state,
            progress=progress,
            max_steps=steps,
            eval_loader=datasets.eval,
            eval_steps=assemble.eval_interval(config, steps),
            eval_on_start=config.inference.eval_on_start,
            max_eval_batches=config.inference.max_eval_batches,
            checkpointer=self.saver if config.output.save_strategy != "no" else None,
            save_steps=assemble.save_interval(config, steps),
        )
        if interrupt.requested is not None:
            raise Interrupted(interrupt.requested)
        fault.point("trained")
        self.metrics |= job_output.last_evaluation(self.run_dir.path / "metrics.jsonl")
        if recipe.embedded:
            self.metrics |= recipe.examine("after", trainer, state, datasets)
        model_dir = self._export(parts.model, state, parts.tokenizer)
        paths = {"model": model_dir, "metrics": self.run_dir.path / "metrics.jsonl"}
        if config.output.save_strategy != "no":
            paths["checkpoints"] = self.run_dir.checkpoints
        seconds = time.monotonic() - self.start_s
        job_output.show_summary(self.console, seconds, self.metrics, recipe.headline, paths)
        return JobResult(state, self.metrics, self.run_dir.path, model_dir)

    def _assemble(self) -> tuple["_Parts", Any]:
        """All that a run is made of, and the parameters to begin with, or None."""
        config, recipe = self.config, self.recipe
        if self.start is not None:
            for line in job_checks.changed_fields(config, self._old_run()):
                self.console.print(f"changed since the run began: {line}", markup=False)
        fault.point("data")
        tokenizer = assemble.make_tokenizer(config)
        model, params = recipe.make_model(weights=self.start is None or self.freezes)
        self.base = assemble.adapter_base(config)
        datasets = recipe.datasets(tokenizer, model.config, self.rows)
        recipe.show_data(datasets)
        updates = recipe.updates_per_item * len(datasets.train)
        steps = assemble.total_steps(config, updates)
        batch = memory.largest_batch(datasets.train, steps)
        model, attention = kernels.settle(model, 2 if batch is None else memory.rows_of(batch)[1])
        self.console.print(f"attention: {attention}", markup=False)
        trainer = self._trainer(model, tokenizer, steps)
        job_checks.check_state_memory(config, trainer)
        if params is None and (self.start is None or self.freezes):
            params = recipe.fresh_params(model, tokenizer)
        return _Parts(tokenizer, model, datasets, trainer, updates, steps, batch), params

    def _begin(self, parts: "_Parts", state) -> None:
        """Checks what is left to be checked, says what will be done, and marks the directory."""
        config = self.config
        if config.output.overwrite_output_dir:  # not before: all that was read is as it should be
            self.run_dir.clear(self.console.print)
        self._check_disk(state, parts.steps)
        job_output.show_plan(self.console, config, state, parts.steps, self.recipe.plan)
        if config.peft.use_peft and not (self.base or config.peft.merge_lora):
            self.console.print("the adapter will be merged: its base is no directory to refer to")
        if self.start is not None:
            job_output.check_same_data(config, parts.datasets.digest, self._old_run())
        job_output.write_config(config, self.run_dir.path, parts.datasets)
        self.begun = True

    def show_how_to_go_on(self) -> None:
        if self.begun:
            steps = self.checkpointer.steps()
            job_output.show_how_to_go_on(self.console, steps, self._resume_command())
        else:
            self.console.print("stopped before the first update: the same command begins again")

    def how_to_recover(self) -> str:
        return job_output.how_to_recover(self.checkpointer.steps(), self._resume_command())

    def _resume_command(self) -> str:
        return job_output.resume_command(self.config, self.run_dir.path)

    def _trainer(self, model, tokenizer, steps: int):
        config = self.config
        self.progress = progress = Progress(self.console)
        logging_steps = resolve_steps(config.output.logging_steps, steps)
        others = self.recipe.callbacks(self.run_dir.path, logging_steps)
        listeners = [progress, *(other for other in others if hasattr(other, "show"))]
        log = MetricsLog(
            self.run_dir.path / "metrics.jsonl",
            logging_steps,
            listeners=tuple(listener.show for listener in listeners),
        )
        optimizer = assemble.make_optimizer(config, steps)
        return self.recipe.trainer(model, tokenizer, optimizer, (log, progress, *others))

    def _start_state(self, trainer, params):
        """`(state, progress)`: fresh, or from the checkpoint to resume from."""
        seed, state, frozen = self.config.hyperparams.seed, None, {}
        if self.start is None or self.freezes:
            state = assemble.make_state(trainer, params, seed)
        if self.freezes:
            frozen = state.frozen
            self.saver = FrozenElsewhere(self.checkpointer, frozen)
        if self.start is None:
            return state, None
        state = None  # what is trained comes from the checkpoint
        template = jax.eval_shape(trainer.create_train_state, jax.random.key(seed))
        template = template.replace(frozen={}) if self.freezes else template
        if self.start == "auto":
            state, progress, step = self.checkpointer.restore(template)
        else:
            state, progress, step = restore_checkpoint(self.start, template, warn=warnings.warn)
        if self.freezes:
            self.saver.check(progress)
            state = state.replace(frozen=frozen)
        self.console.print(f"resuming after step {step}")
        return state, progress

    def _old_run(self) -> Path:
        return self.run_dir.path if self.start == "auto" else Path(self.start).parent.parent

    def _check_disk(self, state, steps: int) -> tuple[int, int, int]:
        return job_checks.check_disk(
            self.config,
            self.run_dir.path,
            state,
            save_interval=assemble.save_interval(self.config, steps),
            steps=steps,
            saved_steps=len(self.checkpointer.steps()),
            only_trained=self.freezes,
            only_adapter=self.base is not None,
        )

    def _export(self, model, state, tokenizer) -> Path:
        model_dir = self.run_dir.path / "final"
        try:
            fault.point("export")
            weights = merge(state.eval_params, state.frozen)
            if self.base is not None:
                return save_adapter(model_dir, model, weights, self.base, tokenizer)
            if model.lora is not None:
                weights = merge_adapters(weights, model.lora)
            generation = assemble.generation_config(self.config.model.model_name_or_path)
            return self.recipe.save(model_dir, model, weights, tokenizer, generation)
        except (OSError, SafetensorError) as error:
            reason = full_disk(error) or str(error)
            raise CheckpointError(
                f"the model cannot be written to '{model_dir}': {reason}. {self.how_to_recover()}"
            ) from error
