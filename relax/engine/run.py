"""One run, from its configuration to its model directory."""

import dataclasses
import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from safetensors import SafetensorError

from relax import parallel
from relax.callbacks import MetricsLog, Progress
from relax.callbacks.progress import working
from relax.checkpoint.checkpointer import Checkpointer, full_disk, restore_checkpoint
from relax.checkpoint.frozen import WithoutFrozen
from relax.checkpoint.storage import copies_are_apart
from relax.config import TrainerConfig, resolve_steps
from relax.engine import checks, devices, memory, model_source, output
from relax.engine.recipes import recipe_of
from relax.engine.run_dir import RunDir
from relax.engine.watch import RunMonitor
from relax.errors import CheckpointError, ErrorList
from relax.models import kernels
from relax.models.huggingface.peft import save_adapter
from relax.models.lora import merge_adapters
from relax.parallel import processes
from relax.trainers.interrupt import Interrupt, Interrupted


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What a job leaves.

    Attributes:
      state: the final state, or the best one with `load_best_model_at_end`; None where the job
        failed, and after a dry run.
      metrics: of the last evaluation; for the embedded task `exact_match_before` and
        `exact_match` as well; of a dry run what it measured.
      output_dir: the run's directory.
      model_dir: the Hugging Face directory of the trained model, or of its adapter; None where
        there is none.
      best_checkpoint: the one with the best evaluation, or without evaluations the newest; None
        where none was saved.
      error: why the job failed; None where it did not.
    """

    state: Any
    metrics: dict[str, float]
    output_dir: Path
    model_dir: Path | None = None
    best_checkpoint: Path | None = None
    error: Exception | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
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


class Job:
    """One run, from its configuration to its model directory."""

    def __init__(
        self,
        config: TrainerConfig,
        run_dir: RunDir,
        console: Console,
        rows=None,
        watch: RunMonitor | None = None,
    ):
        self.config, self.run_dir, self.console, self.rows = config, run_dir, console, rows
        self.start_s = time.monotonic()
        self.metrics: dict[str, float] = {}
        self.problems = ErrorList()
        self.start = self.recipe = None
        output, dry = config.output, config.debug.dry_run
        asked = (output.resume, output.overwrite_output_dir, console.print)
        with self.problems.catch():
            look = run_dir.look if dry else partial(run_dir.prepare, clear=False)
            self.start = processes.broadcast_from_main(lambda: _text(look(*asked)))
        self.begun = self.start is not None  # there is a run here that can be resumed
        asynchronous = copies_are_apart() if output.save_async is None else output.save_async
        self.checkpointer = Checkpointer(
            run_dir.checkpoints,
            save_total_limit=output.save_total_limit,
            asynchronous=asynchronous,
            warn=warnings.warn,
        )
        if not dry:
            self.problems.raise_all()
            processes.broadcast_from_main(self.checkpointer.sweep)
        with self.problems.catch():
            self.watch = watch or RunMonitor(config, run_dir, console)
        with self.problems.catch():
            self.recipe = recipe_of(devices.for_all_devices(config), console)
        if not dry:
            self.problems.raise_all()
        # A checkpoint then holds what is trained; the rest is had again from where it came from.
        self.freezes = (
            config.peft.use_peft
            or config.peft.freeze is not None
            or (self.recipe is not None and self.recipe.reference_is_initial_model)
        )
        self.saver: Checkpointer | WithoutFrozen = self.checkpointer
        self.base: str | None = None  # what the exported adapter is for, if one is exported

    def close(self) -> None:
        if self.recipe is not None:
            self.recipe.close()

    def run(self, interrupt: Interrupt) -> JobResult:
        config, recipe = self.config, self.recipe
        parts, params = self.assemble()
        trainer, datasets, steps = parts.trainer, parts.datasets, parts.steps
        state, progress = self.start_state(trainer, params)
        params = None  # the state has taken them over, and the first update reuses their memory
        self._begin(parts, state)
        if recipe.embedded and progress is None:
            self.metrics |= recipe.examine("before", trainer, state, datasets)
            self.watch.status.tell_results(self.metrics)
        if int(state.step) < steps and parts.batch is not None:
            # Of batches that come to be in the run nothing is known yet.
            self.progress.announce(parts.batch)
            checks.check_update_memory(config, trainer, state, parts.batch, self.console)
        state = trainer.train(
            devices.shared(datasets.train),
            num_epochs=math.ceil(steps / parts.updates_per_epoch),
            state=state,
            progress=progress,
            max_steps=steps,
            eval_loader=datasets.eval,
            eval_steps=model_source.eval_interval(config, steps),
            eval_on_start=config.inference.eval_on_start,
            max_eval_batches=config.inference.max_eval_batches,
            checkpointer=self.saver if config.output.save_strategy != "no" else None,
            save_steps=model_source.save_interval(config, steps),
        )
        if interrupt.requested is not None:
            raise Interrupted(interrupt.requested)
        self.metrics |= output.last_evaluation(self.run_dir.path / "metrics.jsonl")
        state, evaluation = self.watch.best_state(state)
        self.metrics |= evaluation
        if recipe.embedded:
            self.metrics |= recipe.examine("after", trainer, state, datasets)
            self.watch.status.tell_results(self.metrics)
        with working(self.console, "writing the model"):
            model_dir = self._export(parts, state)
        paths = {"model": model_dir, "metrics": self.run_dir.path / "metrics.jsonl"}
        if config.output.save_strategy != "no":
            paths["checkpoints"] = self.run_dir.checkpoints
        seconds = time.monotonic() - self.start_s
        output.show_summary(self.console, seconds, self.metrics, recipe.headline, paths)
        best = output.best_checkpoint(config, self.run_dir.path)
        return JobResult(state, self.metrics, self.run_dir.path, model_dir, best)

    def assemble(self) -> tuple["Parts", Any]:
        """All that a run is made of, and the parameters to begin with, or None.

        Raises:
          RelaxError: all that is wrong, at once.
        """
        config, recipe, found = self.config, self.recipe, self.problems
        tokenizer = model = datasets = None
        if self.start is not None:
            with found.catch():
                for line in checks.changed_fields(config, self._old_run()):
                    self.console.print(f"changed since the run began: {line}", markup=False)
        with found.catch():
            with working(self.console, "loading the tokenizer"):
                tokenizer = model_source.make_tokenizer(config)
        with found.catch():
            weights = self.start is None or self.freezes
            make = partial(model_source.make_model, config) if recipe is None else recipe.make_model
            with working(self.console, "loading the model"):
                model, params = make(weights=weights)
            self.base = model_source.adapter_base(config)
        if recipe is not None and tokenizer is not None and model is not None:
            with working(self.console, "reading and tokenising the data"):
                datasets = checks.read_datasets(recipe, tokenizer, model.config, self.rows, found)
        else:  # files can be read all the same
            with found.catch():
                model_source.source_rows(config, self.rows)
        found.raise_all()
        recipe.show_data(datasets)
        updates = recipe.updates_per_item * len(datasets.train)
        steps = model_source.total_steps(config, updates, recipe.updates_per_item)
        if 0 < config.hyperparams.max_steps != steps:
            self.console.print(
                f"max_steps {config.hyperparams.max_steps} becomes {steps}: a rollout is "
                f"{recipe.updates_per_item} updates"
            )
        batch = memory.largest_batch(datasets.train, steps)
        model, attention = kernels.select_attention(
            model, 2 if batch is None else memory.rows_of(batch)[1]
        )
        self.console.print(f"attention: {attention}", markup=False)
        trainer = self._trainer(model, tokenizer, steps, datasets.eval)
        checks.check_state_memory(config, trainer)
        if params is None and (self.start is None or self.freezes):
            params = recipe.fresh_params(model, tokenizer)
        return Parts(tokenizer, model, datasets, trainer, updates, steps, batch), params

    def _begin(self, parts: "Parts", state) -> None:
        """Checks what is left to be checked, says what will be done, and marks the directory."""
        config = self.config
        if config.output.overwrite_output_dir:  # not before: all that was read is as it should be
            self.run_dir.clear(self.console.print)
        self.check_disk(state, parts.steps)
        output.show_plan(self.console, config, state, parts.steps, self.recipe.plan)
        if config.peft.use_peft and not (self.base or config.peft.merge_lora):
            self.console.print("the adapter will be merged: its base is no directory to refer to")
        self.check_same_data(parts.datasets)
        output.write_config(config, self.run_dir.path, parts.datasets)
        if self.start is not None:
            output.copy_metrics(self._old_run(), self.run_dir.path)
        self.watch.begin(resumed=self.start is not None)
        self.begun = True

    def show_how_to_go_on(self) -> None:
        if self.begun:
            steps = self.checkpointer.steps()
            output.show_how_to_go_on(self.console, steps, self._resume_command())
        else:
            self.console.print("stopped before the first update: the same command begins again")

    def how_to_recover(self, first: str = "make room") -> str:
        return output.how_to_recover(self.checkpointer.steps(), self._resume_command(), first)

    def _resume_command(self) -> str:
        return output.resume_command(self.config, self.run_dir.path)

    def _trainer(self, model, tokenizer, steps: int, eval_loader):
        config = self.config
        self.progress = progress = Progress(self.console)
        logging_steps = resolve_steps(config.output.logging_steps, steps)
        others = self.watch.callbacks(
            self.recipe.callbacks(self.run_dir.path, logging_steps),
            tokenizer,
            eval_loader,
            eos_token_ids=model_source.end_tokens(config.model.model_name_or_path, tokenizer),
            stop=self.recipe.stop_sequences,
        )
        listeners = [progress, *(other for other in others if hasattr(other, "show"))]
        # The status first: a warning that another one gives is then of this step.
        listeners.sort(key=lambda one: one is not self.watch.status)
        log = MetricsLog(
            self.run_dir.path / "metrics.jsonl",
            logging_steps,
            listeners=tuple(listener.show for listener in listeners),
        )
        optimizer = self.recipe.optimizer(steps)
        return self.recipe.trainer(model, tokenizer, optimizer, (log, progress, *others))

    def start_state(self, trainer, params):
        """`(state, progress)`: fresh, or from the checkpoint to resume from."""
        seed, state, frozen = self.config.hyperparams.seed, None, {}
        if self.start is None or self.freezes:
            state = self.recipe.start(trainer, params)
        if self.freezes:
            frozen = state.frozen
            self.saver = WithoutFrozen(self.checkpointer, frozen)
            self.watch.save_best_as(self.saver)
        if self.start is None:
            return state, None
        state = None  # what is trained comes from the checkpoint
        template = jax.eval_shape(trainer.create_train_state, jax.random.key(seed))
        template = parallel.sharded_shapes(template)
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

    def check_same_data(self, datasets) -> None:
        if self.start is not None:
            output.check_same_data(self.config, datasets.digest, self._old_run())

    def check_disk(self, state, steps: int) -> tuple[int, int, int]:
        return checks.check_disk(
            self.config,
            self.run_dir.checkpoints.parent,
            state,
            save_interval=model_source.save_interval(self.config, steps),
            steps=steps,
            saved_steps=len(self.checkpointer.steps()),
            only_trained=self.freezes,
            only_adapter=self.base is not None,
        )

    def _export(self, parts: "Parts", state) -> Path:
        model, tokenizer = parts.model, parts.tokenizer
        model_dir = self.run_dir.path / "final"
        try:
            weights = parts.trainer.model_params(state.eval_params, state.frozen)
            if self.base is not None:
                return save_adapter(model_dir, model, weights, self.base, tokenizer)
            if model.lora is not None:
                weights = merge_adapters(weights, model.lora)
            generation = model_source.generation_config(self.config.model.model_name_or_path)
            return self.recipe.save(model_dir, model, weights, tokenizer, generation)
        except (OSError, SafetensorError) as error:
            reason = full_disk(error) or str(error)
            raise CheckpointError(
                f"the model cannot be written to '{model_dir}': {reason}. {self.how_to_recover()}"
            ) from error


def _text(start: Path | str | None) -> str | None:
    """Where to start, as other processes can be told."""
    return None if start is None else str(start)
