"""Rules for the configuration of every run, whatever its algorithm."""

import re
from collections.abc import Iterator

from relax.config.mesh import parse_mesh
from relax.config.names import suggestion
from relax.config.rules import NoEffect, Rule, Values, needs, warns
from relax.config.text import quote
from relax.config.watch_rules import (
    EVALUATION_METRIC,
    TRACKERS,
    is_reference,
    keeps_best,
    profile_window,
)
from relax.errors import ConfigError

AUTO = "auto"
NO_ROW = "no rows are held out; give eval_dataset_name or test_size"

# Options that each optimizer uses, besides learning_rate and weight_decay, which all use.
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_MOMENT = "momentum_dtype"
OPTIMIZER_FIELDS: dict[str, tuple[str, ...]] = {
    "adamw": (*_ADAM, _MOMENT),
    "adamw_8bit": _ADAM,
    "adafactor": (),
    "lion": (*_ADAM[:2], _MOMENT),
    "muon": (*_ADAM, _MOMENT),  # adam_*: for weights that are not matrices
    "sgd": (),
    "schedule_free_adamw": _ADAM,
}


def _is_read(field: str) -> NoEffect:
    readers = [optim for optim, fields in OPTIMIZER_FIELDS.items() if field in fields]
    return needs(field, "optim", *readers, warn=True)


NO_EFFECT = (
    NoEffect(
        "num_train_epochs",
        lambda v: v.given("max_steps"),
        "max_steps sets the length of the run; give one of them",
    ),
    warns(
        "data_seed",
        lambda v: not v["shuffle_dataset"] and not v.given("test_size"),
        "shuffle_dataset is false and test_size holds out no rows",
    ),
    warns(
        "warmup_steps",
        lambda v: v["lr_scheduler_type"] == "constant",
        "use lr_scheduler_type constant_with_warmup",
    ),
    *map(_is_read, (*_ADAM, _MOMENT)),
    needs("num_decay_steps", "lr_scheduler_type", "wsd", warn=True),
    needs("min_lr_rate", "lr_scheduler_type", "cosine_with_min_lr", "wsd", warn=True),
    needs("gradient_checkpointing_policy", "gradient_checkpointing", warn=True),
    NoEffect("offload_optimizer", lambda v: v["optim"] == "sgd", "sgd has no state"),
    needs(
        "lora_r lora_alpha lora_dropout lora_target_modules merge_lora use_rslora use_dora "
        "lora_modules_to_save rank_pattern alpha_pattern "
        "quantize_base",
        "use_peft",
    ),
    NoEffect(
        "quantize_base",
        lambda v: v["model_name_or_path"] is None,
        "the demo model is made here, not read; give model_name_or_path",
    ),
    NoEffect("freeze", lambda v: v["use_peft"], "use_peft freezes all weights but the adapters"),
    needs("dataset_config dataset_kwargs dataset_train_split dataset_test_split", "dataset_name"),
    needs("dataset_text_field eval_dataset_name test_size mixing_strategy", "dataset_name"),
    needs("packing_strategy eval_packing", "packing"),
    needs("truncation_mode", "max_length"),
    needs("train_on", "assistant_only_loss"),
    NoEffect(
        "truncation_mode",
        lambda v: _all_packed(v) and v["packing_strategy"] != "bfd",
        "packing_strategy {packing_strategy} splits long rows",
    ),
    NoEffect(
        "pad_to_multiple_of",
        lambda v: _all_packed(v) and v["max_length"] is not None,
        "packed rows are max_length long",
    ),
    NoEffect(
        "stop_sequences",
        lambda v: "max_completion_length" not in v and not _samples(v),
        "the run samples nothing; give num_samples for previews",
    ),
    needs("eval_steps", "eval_strategy", "steps"),
    NoEffect(
        "dataset_test_split eval_packing per_device_eval_batch_size max_eval_batches num_samples",
        lambda v: not v.holds_out(),
        NO_ROW,
    ),
    NoEffect(
        "max_new_tokens",
        lambda v: "max_completion_length" in v,
        "max_completion_length limits completions",
    ),
    NoEffect(
        "max_new_tokens",
        lambda v: not _samples(v),
        "num_samples is {num_samples}; give it, or eval_tasks",
    ),
    needs("eval_tasks_limit eval_reward_funcs", "eval_tasks"),
    needs("save_steps", "save_strategy", "steps"),
    needs("save_total_limit save_async", "save_strategy", "steps", "epoch"),
    NoEffect("allow_config_change", lambda v: v["resume"] == "never", "resume is never"),
    NoEffect(
        "greater_is_better",
        lambda v: not _compares(v),
        "nothing is compared; give metric_for_best_model",
    ),
    needs("early_stopping_threshold", "early_stopping_patience"),
    NoEffect(
        "run_name",
        lambda v: not set(v["report_to"]) - {"tensorboard", "none"},
        "only wandb and trackio use it; give report_to",
    ),
    needs("sharding_rules", "mesh"),
    needs("num_processes process_id", "coordinator"),
    NoEffect(
        "num_processes process_id",
        lambda v: v["coordinator"] == AUTO,
        "coordinator auto takes it from the environment",
    ),
)


def _samples(v: Values) -> bool:
    """Whether the run samples completions besides those that it trains on."""
    return bool(v["num_samples"] or v["eval_tasks"])


def _all_packed(v: Values) -> bool:
    """Whether evaluation rows are packed too; unpacked ones are truncated and padded."""
    return bool(v.get("packing")) and v["eval_packing"] is not False


def _compares(v: Values) -> bool:
    return keeps_best(v) or v["early_stopping_patience"] is not None


def _run(v: Values) -> Iterator[str]:
    if v["max_steps"] == 0:
        yield "max_steps must be -1 (no limit) or at least 1, got 0"


def _optimizer(v: Values) -> Iterator[str]:
    schedule = v["lr_scheduler_type"]
    if v["optim"] == "schedule_free_adamw":
        if not schedule.startswith("constant"):
            yield (
                "optim schedule_free_adamw averages weights and needs no decay, got "
                f"lr_scheduler_type {schedule}: make it constant_with_warmup or constant"
            )
        if v["adam_beta1"] == 0:
            yield "adam_beta1 must be above 0 with optim schedule_free_adamw, got 0.0"
    if schedule == "cosine_with_min_lr" and v["min_lr_rate"] == 0:
        yield "lr_scheduler_type cosine_with_min_lr needs min_lr_rate above 0; give min_lr_rate"


def _peft(v: Values) -> Iterator[str]:
    targets, freeze = v["lora_target_modules"], v["freeze"]
    if not targets:
        yield "lora_target_modules must name linear layers, or be all-linear, got none"
    elif "all-linear" in targets and len(targets) > 1:
        yield f"lora_target_modules must be all-linear or names, got {','.join(targets)}"
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        for key, value in v[name].items():
            if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
                yield f"{name} must give each name a number above 0, got {key}: {quote(value)}"
    try:
        re.compile(freeze or "")
    except re.error as error:
        yield f"freeze must be a regular expression, got {quote(freeze)}: {error}"


def _data(v: Values) -> Iterator[str]:
    if v["dataset_name"] is not None and v.given("test_size"):
        for other in ("eval_dataset_name", "dataset_test_split"):
            if v.given(other):
                yield f"test_size and {other} exclude each other: give one of them"
                return


def _packing(v: Values) -> Iterator[str]:
    if v.get("packing") and v["max_length"] is None:
        yield "packing needs max_length: packed rows are that long; give max_length"


def _stop_sequences(v: Values) -> Iterator[str]:
    sequences = v["stop_sequences"] or ()
    again = next((s for s in sequences if sequences.count(s) > 1), None)
    if again is not None:
        yield f"stop_sequences must name each text once, got {quote(again)} again"


def _output(v: Values) -> Iterator[str]:
    resume = v["resume"]
    if resume.lower() in ("true", "false", "yes", "no", "1", "0"):
        yield f"resume must be auto, never or the path of a checkpoint, got {resume!r}"
    if v.given("overwrite_output_dir") and resume == "auto":
        yield "overwrite_output_dir deletes the run that resume auto would continue; give one"


def _watching(v: Values) -> Iterator[str]:
    metric = v["metric_for_best_model"]
    if metric is not None and not EVALUATION_METRIC.fullmatch(metric):
        yield (
            f"metric_for_best_model must be an evaluation metric, got {metric!r}; "
            f"did you mean eval_{metric}?"
        )
    if _compares(v) and v["eval_strategy"] == "no":
        patient = v["early_stopping_patience"] is not None
        name = "early_stopping_patience" if patient else "load_best_model_at_end"
        name = "metric_for_best_model" if metric is not None else name
        yield f"{name} compares evaluations, and eval_strategy is no; make it steps or epoch"
    trackers = v["report_to"]
    for name in trackers:
        if trackers != ["none"] and name not in TRACKERS and not is_reference(name):
            yield (
                f"report_to must be one of {', '.join(TRACKERS)}, or path/to/file.py:Class, got "
                f"{name!r}"
            )
    if len(set(trackers)) < len(trackers):
        yield f"report_to must name each tracker once, got {','.join(trackers)}"
    if v["profile_steps"] is not None:
        try:
            profile_window(v["profile_steps"])
        except ValueError as error:
            yield f"profile_steps {error}"
    for spec in v["callbacks"]:
        if not is_reference(spec):
            yield f"callbacks must be path/to/file.py:Class or package.module.Class, got {spec!r}"


def _devices(v: Values) -> Iterator[str]:
    mesh, coordinator = v["mesh"], v["coordinator"]
    count, number = v["num_processes"], v["process_id"]
    if mesh is not None:
        try:
            parse_mesh(mesh)
        except ConfigError as error:
            yield str(error)
    if coordinator is None:
        return
    if mesh is None:
        yield "coordinator needs mesh: several processes share one mesh; give mesh auto"
    if coordinator == AUTO:
        return
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        yield f"coordinator must be HOST:PORT of process 0, or auto, got {coordinator!r}"
    if count is None or number is None:
        yield "coordinator needs num_processes and process_id; give them, or coordinator auto"
    elif number >= count:
        yield f"process_id must be below num_processes, got {number} of {count}"


def _names(v: Values) -> Iterator[str]:
    for name in v["allow_config_change"]:
        if name not in v:
            yield f"allow_config_change names no field: {name!r}.{suggestion(name, v)}"


RULES: tuple[Rule, ...] = (
    _run,
    _optimizer,
    _peft,
    _data,
    _packing,
    _stop_sequences,
    _output,
    _watching,
    _devices,
    _names,
)
