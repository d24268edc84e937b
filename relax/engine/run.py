"""A run, from its configuration to its model directory: the steps of all recipes.

    with Run(config) as run:
        tokenizer = run.load_tokenizer()
        model, params = run.load_model()
        data = run.load_data(read_sft_data, tokenizer, model, kind="completions")
        trainer = SFTTrainer(model, run.make_optimizer(data), params=params, **run.options(data))
        return run.train(trainer, data)

If a step before `load_data` fails, its problem is recorded, it returns None, and `load_data`
reports all problems together.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from safetensors import SafetensorError

from relax import parallel
from relax.callbacks import MetricsLog, Progress
from relax.callbacks.progress import working
from relax.checkpoint.checkpointer import full_disk, restore_checkpoint
from relax.checkpoint.frozen import WithoutFrozen
from relax.config import resolve_steps
from relax.engine import checks, memory, output, schedule
from relax.engine.context import C_co, RunContext
from relax.engine.dry_run import dry_run
from relax.engine.model_source import make_model
from relax.engine.rows import Data, read_sources, source_rows
from relax.engine.tasks.callback import task_evaluation
from relax.errors import CheckpointError
from relax.models import kernels, save_pretrained
from relax.models.huggingface.peft_save import save_adapter
from relax.models.huggingface.quantized import BaseQuantizer, original_weights
from relax.models.lora import merge_adapters
from relax.monitor.card import write_card
from relax.monitor.run_files import read_run
from relax.parallel import processes
from relax.trainers.interrupt import Interrupted

D = TypeVar("D", bound=Data)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
      state: the final state, or the best one with `load_best_model_at_end`; None if the run failed
        and after a dry run.
      metrics: metrics of the last evaluation; for the demo task also those before training; after
        a dry run its measurements.
      output_dir: the run's directory.
      model_dir: the Hugging Face directory of the trained model or adapter, or None.
      best_checkpoint: the checkpoint with the best evaluation, or without evaluations the newest;
        None if none was saved.
      error: the exception if the run failed, else None.
    """

    state: Any
    metrics: dict[str, float]
    output_dir: Path
    model_dir: Path | None = None
    best_checkpoint: Path | None = None
    error: Exception | None = None


class Run(RunContext[C_co]):
    """A run, used as a context manager, whose methods are its steps.

    Args:
      config: the configuration of an algorithm.
      train_rows, eval_rows: rows instead of configured datasets: lists of dicts, `datasets` objects
        or other iterables of dicts; `eval_rows` may be a mapping of names to several.
      status_writer: receives the status of the run, even if it cannot start.
      console: shows the progress; None: standard output.

    Raises:
      RelaxError: a problem with the configuration, the data, the model or the disk.
      Interrupted: Ctrl-C or SIGTERM, after saving and printing the resume command.
    """

    # Steps.

    def load_tokenizer(self):
        """Loads the model's tokenizer, changed by flags; None if there is a problem."""
        changes = (self.config.profile.chat_template_path, self.config.data.eos_token)
        with working(self.console, "loading the tokenizer"):
            self.tokenizer = self.attempt(lambda: self.source.tokenizer(*changes))
        if self.tokenizer is not None:
            self.attempt(self.source.check_tokens, self.tokenizer)
        return self.tokenizer

    def load_model(self, *, has_initial_reference: bool = False, load: Callable | None = None):
        """Loads the model and its parameters, `(model, params)`.

        `params` is None if a checkpoint or random initialisation supplies them; both are None if
        there is a problem. The trainer takes ownership of `params`, so there is no second copy.

        Args:
          has_initial_reference: the state holds the initial model as a constant reference, which is
            reloaded on resume and not stored in checkpoints.
          load: replaces `ModelSource.load`.
        """
        config = self.config
        has_initial_reference &= config.model.model_name_or_path is not None
        is_partial = config.peft.use_peft or config.peft.freeze is not None
        self.keeps_frozen = is_partial or has_initial_reference
        weights = self.resume_from is None or self.keeps_frozen
        kind = config.peft.quantize_base
        self._quantizer = None if kind is None else BaseQuantizer(kind)
        make = partial(
            make_model, config=config, weights=weights, load=load, quantize=self._quantizer
        )
        with working(self.console, "loading the model"):
            model, params = self.attempt(lambda: make(self.source)) or (None, None)
        if self._quantizer is not None and params is not None:
            self.console.print(self._quantizer.report(), markup=False)
        if model is not None:
            length = self.config.flat().get("pad_to_multiple_of") or 8
            parents = config.algorithm != "sft" and model.attn_implementation != "splash"
            self._attention = kernels.describe_attention(model, length, parents)
        return model, params

    def load_data(
        self, read: Callable[..., D], tokenizer, model, *, kind, demo_rows=None, **parts
    ) -> D:
        """Reads, tokenises and batches the rows, and prints the data report.

        Args:
          read: returns `Data` for `(config, tokenizer, model_config=..., sources=..., **parts)`.
          kind, demo_rows: as for `read_sources`.
          **parts: other arguments of `read`; None marks one with a problem.

        Raises:
          RelaxError: all problems of the run so far, together.
        """
        if any(part is None for part in (tokenizer, model, *parts.values())):
            # The rows can still be read.
            self.attempt(source_rows, self.config, self.rows)
            self.problems.raise_all()
        with working(self.console, "reading and tokenising the data"):
            sources = self.attempt(
                read_sources, self.config, kind, self.console, self.rows, demo_rows
            )
            data: D | None = None
            if sources is not None:
                make = partial(read, self.config, tokenizer, sources=sources, **parts)
                data = checks.read_data(make, model.config, self.problems)
        end = self.source.end_tokens(tokenizer)
        make_tasks = partial(task_evaluation, self.config, tokenizer, model.config, end)
        self.task_evaluation = self.attempt(make_tasks)
        self.problems.raise_all()
        assert data is not None  # where it is None there was a problem
        self.console.print(f"attention: {self._attention}", markup=False)
        data.show(self.console)
        if data.mixture is not None:
            epochs = self.steps(data) / data.updates_per_epoch
            for line in data.mixture.lines(epochs):
                self.console.print(line, markup=False)
        asked, steps = self.config.hyperparams.max_steps, self.steps(data)
        if 0 < asked != steps:
            self.console.print(
                f"max_steps {asked} becomes {steps}: a rollout is {data.updates_per_item} updates"
            )
        return data

    def logging_steps(self, data: Data) -> int:
        """Number of updates per line of metrics."""
        return resolve_steps(self.config.output.logging_steps, self.steps(data))

    def steps(self, data: Data) -> int:
        """Number of updates in the whole run."""
        return schedule.total_steps(self.config, data.updates_per_epoch, data.updates_per_item)

    def make_optimizer(self, data: Data):
        """Makes the configured optimizer, with its schedule over the whole run."""
        return schedule.make_optimizer(self.config, self.steps(data))

    def options(self, data: Data, *callbacks) -> dict[str, Any]:
        """Arguments for every trainer: accumulation, clipping, frozen weights, callbacks.

        Where a loader's rows are packed, also `pad_to_multiple_of`.

        Args:
          callbacks: the algorithm's callbacks, which run after the logging ones.
        """
        h, fields = self.config.hyperparams, self.config.flat()
        packing = {}
        if "pad_to_multiple_of" in fields:
            packing["pad_to_multiple_of"] = fields["pad_to_multiple_of"] or 1
        return packing | {
            "donate_params": True,
            "freeze": self.config.peft.freeze,
            "gradient_accumulation_steps": h.gradient_accumulation_steps,
            "max_grad_norm": h.max_grad_norm,
            "callbacks": self._callbacks(data, callbacks),
        }

    def train(
        self,
        trainer,
        data: Data,
        *,
        headline: tuple[str, ...] = ("eval_loss",),
        evaluate_demo: Callable | None = None,
        save: Callable = save_pretrained,
    ) -> RunResult:
        """Checks memory and disk, starts or resumes, trains, and exports the model.

        Args:
          headline: metrics for the summary, in this order.
          evaluate_demo: for the demo task, returns metrics for `(console, when, trainer, state,
            data)`, where `when` is "before" or "after".
          save: writes the model's directory, see `save_pretrained`.
        """
        if self.is_dry:
            return RunResult(None, dry_run(self, trainer, data), self.run_dir.path)
        config, steps = self.config, self.steps(data)
        if evaluate_demo is not None:
            evaluate_demo = partial(evaluate_demo, self.console) if self.is_demo else None
        checks.check_state_memory(config, trainer, data, steps, self.console)
        state, progress = self.first_state(trainer)
        self._begin(trainer, data, state)
        if evaluate_demo is not None and progress is None:
            self._note_results(evaluate_demo("before", trainer, state, data))
        batch = memory.largest_batch(data.train, steps, trainer, state)
        if int(state.step) < steps and batch is not None:
            # With rollouts the batch shape is unknown before the first one.
            self.progress.announce(batch)
            checks.check_update_memory(config, trainer, state, batch, self.console)
        state = trainer.train(
            data.train,
            num_epochs=math.ceil(steps / data.updates_per_epoch),
            state=state,
            progress=progress,
            max_steps=steps,
            eval_loader={} if data.eval is None and self.task_evaluation else data.eval,
            eval_steps=schedule.eval_interval(config, steps),
            eval_on_start=config.inference.eval_on_start,
            max_eval_batches=config.inference.max_eval_batches,
            checkpointer=self.saver if config.output.save_strategy != "no" else None,
            save_steps=schedule.save_interval(config, steps),
        )
        asked = (
            self.interrupt.agree()
        )  # a signal after the last update has reached one process only
        if asked is not None:
            raise Interrupted(asked, in_all=True)
        self.metrics |= output.last_evaluation(self.run_dir.path / "metrics.jsonl")
        state, evaluation = self.monitor.best_state(state)
        self.metrics |= evaluation
        if evaluate_demo is not None:
            self._note_results(evaluate_demo("after", trainer, state, data))
        with working(self.console, "writing the model"):
            model_dir = self._export(trainer, state, save)
        return self._finish(state, model_dir, headline)

    # Parts of `train`.

    def first_state(self, trainer) -> tuple[Any, dict | None]:
        """`(state, progress)` of a fresh run, or of the checkpoint to resume from."""
        key = jax.random.key(self.config.hyperparams.seed)
        state: Any = None
        frozen: Any = {}
        if self.resume_from is None or self.keeps_frozen:
            state = trainer.create_train_state(key)
        if self.keeps_frozen:
            frozen = state.frozen
            self.saver = WithoutFrozen(self.checkpointer, frozen)
            self.monitor.save_best_as(self.saver)
        if self.resume_from is None:
            return state, None
        state = None  # the checkpoint supplies the trained parameters
        template = parallel.sharded_shapes(jax.eval_shape(trainer.create_train_state, key))
        template = template.replace(frozen={}) if self.keeps_frozen else template
        if self.resume_from == "auto":
            state, progress, step = self.checkpointer.restore(template)
        else:
            checkpoint = self.resume_from
            state, progress, step = restore_checkpoint(checkpoint, template, warn=warnings.warn)
        if isinstance(self.saver, WithoutFrozen):
            self.saver.check(progress)
            state = state.replace(frozen=frozen)
        self.console.print(f"resuming after step {step}")
        return state, progress

    def _begin(self, trainer, data: Data, state) -> None:
        """Makes the last checks, prints the plan, and marks the directory."""
        config = self.local_config
        if config.output.overwrite_output_dir:  # only now, after all checks
            self.run_dir.clear(self.console.print)
        self.check_disk(state, data)
        output.show_plan(self.console, config, state, self.steps(data), data.plan)
        if config.peft.use_peft and not (self._adapter_base or config.peft.merge_lora):
            self.console.print("the adapter will be merged: PEFT could not load its base model")
        self.check_same_data(data)
        output.write_config(config, self.run_dir.path, data)
        if self.resume_from is not None:
            output.copy_metrics(self._old_run, self.run_dir.path)
        self.monitor.begin(resumed=self.resume_from is not None)
        self.has_begun = True

    def _callbacks(self, data: Data, own: tuple) -> tuple:
        """All callbacks: metrics and progress, then the algorithm's, then those of every run."""
        self.progress = Progress(self.console)
        tasks = () if self.task_evaluation is None else (self.task_evaluation,)
        others = self.monitor.callbacks(
            (*tasks, *own),
            self.tokenizer,
            data.eval,
            eos_token_ids=self.source.end_tokens(self.tokenizer),
            stop=data.stop_sequences,
        )
        listeners = [self.progress, *(other for other in others if hasattr(other, "show"))]
        # The status first, so that warnings of other callbacks get the current step.
        listeners.sort(key=lambda one: one is not self.monitor.status)
        log = MetricsLog(
            self.run_dir.path / "metrics.jsonl",
            self.logging_steps(data),
            listeners=tuple(listener.show for listener in listeners),
        )
        return (log, self.progress, *others)

    def _note_results(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        self.monitor.status.add_results(self.metrics)

    @cached_property
    def _adapter_base(self) -> str | None:
        """The base model of the exported adapter, if one is exported."""
        return self.source.adapter_base(self.config)

    def check_same_data(self, data: Data) -> None:
        processes.check_same({"the tokens of training and evaluation": data.digest})
        if self.resume_from is not None:
            output.check_same_data(self.config, data.digest, self._old_run)

    def check_disk(self, state, data: Data) -> tuple[int, int, int]:
        steps = self.steps(data)
        return checks.check_disk(
            self.config,
            self.run_dir.checkpoints.parent,
            state,
            save_interval=schedule.save_interval(self.config, steps),
            steps=steps,
            saved_steps=len(self.checkpointer.steps()),
            only_trained=self.keeps_frozen,
            only_adapter=self._adapter_base is not None,
        )

    def _export(self, trainer, state, save: Callable) -> Path:
        model, tokenizer = trainer.model, self.tokenizer
        model_dir = self.run_dir.path / "final"
        try:
            weights = trainer.model_params(state.eval_params, state.frozen)
            if self._adapter_base is not None:
                return save_adapter(model_dir, model, weights, self._adapter_base, tokenizer)
            if model.lora is not None:
                if self._quantizer is not None:
                    weights = original_weights(weights, self._quantizer)
                weights = merge_adapters(weights, model.lora)
            options: dict[str, Any] = {"generation_config": self.source.generation_config}
            if save is save_pretrained and self.source.surroundings is not None:
                options["beside"] = self.source.surroundings
            return save(model_dir, model, weights, tokenizer, **options)
        except (OSError, SafetensorError) as error:
            reason = full_disk(error) or str(error)
            raise CheckpointError(
                f"the model cannot be written to '{model_dir}': {reason}. {self._how_to_recover()}"
            ) from error

    def _finish(self, state, model_dir: Path, headline: tuple[str, ...]) -> RunResult:
        if jax.process_index() == 0:
            made = read_run(self.run_dir.path, previews=0, completions=0)
            write_card(model_dir, made, self.metrics, self.source.base_directory)
        paths = {"model": model_dir, "metrics": self.run_dir.path / "metrics.jsonl"}
        if self.config.output.save_strategy != "no":
            paths["checkpoints"] = self.run_dir.checkpoints
        seconds = time.monotonic() - self.start_s
        output.show_summary(self.console, seconds, self.metrics, headline, paths)
        best = output.best_checkpoint(self.config, self.run_dir.path)
        return RunResult(state, self.metrics, self.run_dir.path, model_dir, best)
