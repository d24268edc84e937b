"""From a configuration to a finished run: data, model, optimizer, training, model directory."""

import contextlib
import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from safetensors import SafetensorError

from relax import assemble, fault, memory, remedies
from relax.callbacks import MetricsLog, Progress
from relax.checkpoint import (
    Checkpointer,
    check_space,
    full_disk,
    restore_checkpoint,
    tree_bytes,
)
from relax.checkpoint_frozen import FrozenElsewhere
from relax.config import ConfigLoader, TrainerConfig, resolve_steps
from relax.errors import CheckpointError, ConfigError
from relax.models import kernels
from relax.models.lora import merge_adapters
from relax.models.peft import save_adapter
from relax.models.trainable import merge
from relax.recipes import recipe_of
from relax.run_dir import RunDir, check_same_config, write_json
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
        config = self.config
        self._check_same_config()
        fault.point("data")
        tokenizer = assemble.make_tokenizer(config)
        recipe = self.recipe
        model, params = recipe.make_model(weights=self.start is None or self.freezes)
        self.base = assemble.adapter_base(config)
        datasets = recipe.datasets(tokenizer, model.config, self.rows)
        recipe.show_data(datasets)
        updates = recipe.updates_per_item * len(datasets.train)  # of an epoch
        steps = assemble.total_steps(config, updates)
        batch = memory.largest_batch(datasets.train, steps)
        model, attention = kernels.settle(model, 2 if batch is None else memory.rows_of(batch)[1])
        self.console.print(f"attention: {attention}", markup=False)
        trainer = self._trainer(model, tokenizer, steps)
        self._check_memory(trainer, batch)
        if params is None and (self.start is None or self.freezes):
            params = recipe.fresh_params(model, tokenizer)
        state, progress = self._start_state(trainer, params)
        params = None  # the state has taken them over, and the first update reuses their memory
        if config.output.overwrite_output_dir:  # not before: all that was read is as it should be
            self.run_dir.clear(self.console.print)
        self._check_space(state, steps)
        self._show_plan(state, steps)
        self._write_config(datasets)
        if recipe.embedded and progress is None:
            self.metrics |= recipe.examine("before", trainer, state, datasets)
        if int(state.step) < steps:
            self._check_memory(trainer, batch, state)
        state = trainer.train(
            datasets.train,
            num_epochs=math.ceil(steps / updates),
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
        self.metrics |= self._last_evaluation()
        if recipe.embedded:
            self.metrics |= recipe.examine("after", trainer, state, datasets)
        model_dir = self._export(model, state, tokenizer)
        self._show_summary(model_dir)
        return JobResult(state, self.metrics, self.run_dir.path, model_dir)

    def resume_command(self) -> str:
        """What a person types to go on with this run."""
        script = f"run_{self.config.algorithm}.py"
        if Path(sys.argv[0]).name == script:
            script = sys.argv[0]
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        config = str(self.run_dir.path / "config.json")
        return shlex.join([python, script, "--config", config, "--resume", "auto"])

    def show_how_to_go_on(self) -> None:
        """Tells a person who has stopped the run what was saved, and the command that goes on."""
        if not self.begun:
            self.console.print("stopped before the first update: the same command begins again")
            return
        steps = self.checkpointer.steps()
        saved = f"step {steps[-1]} is saved" if steps else "nothing was saved"
        self.console.print(f"stopped; {saved}. To {'go on' if steps else 'begin again'}:")
        self.console.print(f"  {self.resume_command()}", markup=False)

    def how_to_recover(self) -> str:
        steps = self.checkpointer.steps()
        kept = f"Checkpoint {steps[-1]} is intact" if steps else "No checkpoint was saved"
        return f"{kept}; make room and run: {self.resume_command()}"

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

    def _last_evaluation(self) -> dict[str, float]:
        """From the file, since a resumed run may find its last evaluation done."""
        lines = (self.run_dir.path / "metrics.jsonl").read_text().splitlines()
        evaluations = [
            found
            for record in map(json.loads, lines)
            if (found := {n: v for n, v in record.items() if n.startswith("eval_")})
        ]
        return evaluations[-1] if evaluations else {}

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

    def _check_same_config(self) -> None:
        file = None if self.start is None else self._old_run() / "config.json"
        if file is None or not file.exists():
            return
        old = ConfigLoader(file, type(self.config)).load().flat()
        allow = self.config.output.allow_config_change
        for line in check_same_config(old, self.config.flat(), allow):
            self.console.print(f"changed since the run began: {line}", markup=False)

    def _write_config(self, datasets) -> None:
        file = self.run_dir.path / "data.json"
        if self.start is not None:
            old = self._old_run() / "data.json"
            digest = json.loads(old.read_text())["digest"] if old.exists() else datasets.digest
            allowed = "dataset_name" in self.config.output.allow_config_change
            if digest != datasets.digest and not allowed:
                raise ConfigError(
                    "a resumed run must see the data that it began with, and the tokens of "
                    f"'{self.config.data.dataset_name or 'the embedded set'}' are others now "
                    f"(digest {digest} -> {datasets.digest}). Restore the files, or pass "
                    "--allow_config_change dataset_name to go on all the same."
                )
        reports = {name: report.to_dict() for name, report in datasets.reports.items()}
        write_json(file, {"digest": datasets.digest, "reports": reports})
        saved = self.config.replace(
            resume="never", overwrite_output_dir=False, allow_config_change=[]
        )
        write_json(self.run_dir.path / "config.json", saved.to_dict())
        self.begun = True

    def _check_space(self, state, steps: int) -> None:
        """Room for the checkpoints that will exist at once, and for the model directory."""
        output = self.config.output
        every = assemble.save_interval(self.config, steps)
        copies = 0
        if output.save_strategy != "no":
            copies = 1 + (steps // every if every else 0)
            if output.save_total_limit is not None:
                copies = min(copies, output.save_total_limit + 1)
            # A resumed run has some of them on the disk already.
            copies = max(copies - len(self.checkpointer.steps()), 1)
        saved = state.replace(frozen={}) if self.freezes else state
        model = state.params if self.base else merge(state.params, state.frozen)
        check_space(self.run_dir.path, tree_bytes(saved), copies, others=tree_bytes(model))

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

    def _check_memory(self, trainer, batch, state=None) -> None:
        """Refuses a state that cannot fit before it is made, and an update before the first one."""
        there = memory.capacity(0 if state is None else tree_bytes(state))
        if state is None:
            state = jax.eval_shape(trainer.create_train_state, jax.random.key(0))
            sizes = memory.state_sizes(state, trainer.gradient_accumulation_steps)
        elif batch is None:
            return  # of batches that come to be in the run nothing is known yet
        else:
            self.progress.announce(batch)
            sizes = memory.update_sizes(trainer, state, batch)
            self.console.print(memory.table(sizes, there, memory.rows_of(batch)), markup=False)
        warning = remedies.check(sizes, there, remedies.of_run(self.config, trainer, state, batch))
        if warning is not None and sizes.activations:
            self.console.print(f"warning: {warning}", style="yellow", markup=False)

    def _show_plan(self, state, steps: int) -> None:
        trained, frozen = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (state.params, state.frozen)
        )
        of_all = f"{trained:,} of {trained + frozen:,}" if frozen else f"{trained:,}"
        self.console.print(
            f"training {of_all} parameters for {steps:,} updates of {self.recipe.plan} on "
            f"{jax.devices()[0].device_kind}, {self.config.model.dtype}"
        )
        if self.config.peft.use_peft and not (self.base or self.config.peft.merge_lora):
            self.console.print("the adapter will be merged: its base is no directory to refer to")

    def _show_summary(self, model_dir: Path) -> None:
        seconds = time.monotonic() - self.start_s
        self.console.print(f"done in {seconds:.0f} s")
        for name in self.recipe.headline:
            if name in self.metrics:
                self.console.print(f"  {name:20} {self.metrics[name]:.4f}")
        paths = {"model": model_dir, "metrics": self.run_dir.path / "metrics.jsonl"}
        if self.config.output.save_strategy != "no":
            paths["checkpoints"] = self.run_dir.checkpoints
        for name, path in paths.items():
            self.console.print(f"  {name:20} {path}", markup=False)
