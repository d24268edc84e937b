"""The rules a configuration is held to: types, ranges, contradictions, options without effect.

"Given" means different from the default, and from the embedded run's: a saved configuration spells
out every field, and must load again.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from relax.config import device_rules, watch_rules
from relax.config.names import suggestion
from relax.config.options import INT_MAX, Option
from relax.config.text import quote
from relax.config.values import check_value

Given = Callable[[str], bool]

# Which fields an optimizer reads, besides learning_rate and weight_decay, which all do.
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
OPTIMIZER_FIELDS = {
    "adamw": _ADAM,
    "adafactor": (),
    "lion": _ADAM[:2],
    "muon": _ADAM,  # for what is no matrix
    "sgd": (),
    "schedule_free_adamw": _ADAM,
}

_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")

_LIMITS = {
    "above": (lambda value, limit: value > limit, "above"),
    "at_least": (lambda value, limit: value >= limit, "at least"),
    "below": (lambda value, limit: value < limit, "below"),
    "at_most": (lambda value, limit: value <= limit, "at most"),
}


def problems(
    known: dict[str, Option], values: dict[str, Any], embedded: dict[str, Any]
) -> list[str]:
    """Everything that is wrong with the values of a configuration, one sentence each.

    Where a value is of a wrong type, only the types are reported: nothing else can be told then.
    """
    if any(True for name, option in known.items() for _ in _type(option, values[name])):
        return value_problems(known, values)
    found = value_problems(known, values)
    given = given_by(known, values, embedded)
    for rules in (_run, _optimizer, _peft, _data, _packing, _profile, _evaluation, _output):
        found += rules(values, given)
    found += watch_rules.problems(values, given)
    found += device_rules.problems(values, given)
    found += _names(known, values)
    return found


def value_problems(known: dict[str, Option], values: dict[str, Any]) -> list[str]:
    """Values of a wrong type; where there are none, those out of their range."""
    found = [p for name, option in known.items() for p in _type(option, values[name])]
    return found or [p for name, option in known.items() for p in _range(option, values[name])]


def given_by(known: dict[str, Option], values: dict[str, Any], embedded: dict[str, Any]) -> Given:
    """Tells whether a field differs from its default, and from that of the embedded run."""

    def given(name: str) -> bool:
        return values[name] not in (known[name].default, embedded.get(name, known[name].default))

    return given


def _type(option: Option, value: Any) -> Iterator[str]:
    try:
        check_value(option.type, value)
    except ValueError as error:
        yield f"{option.name} {error}"


def _range(option: Option, value: Any) -> Iterator[str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    whole = isinstance(value, int) or option.steps
    limits = ({"at_most": INT_MAX} if whole else {}) | option.limits
    broken = [
        f"{_LIMITS[k][1]} {limit}" for k, limit in limits.items() if not _LIMITS[k][0](value, limit)
    ]
    if broken:
        yield f"{option.name} must be {broken[0]}, got {quote(value)}"
    elif option.steps and value > 1 and value != int(value):
        yield f"{option.name} must be a whole number, or a ratio below 1, got {value}"


def unused(name: str, reason: str) -> str:
    return f"{name} has no effect: {reason}"


def _run(values: dict[str, Any], given: Given) -> Iterator[str]:
    if values["max_steps"] == 0:
        yield "max_steps must be -1 (no limit) or at least 1, got 0"
    if given("max_steps") and given("num_train_epochs"):
        yield unused("num_train_epochs", "max_steps sets the length of the run; give one of them")
    if given("gradient_checkpointing_policy") and not values["gradient_checkpointing"]:
        yield unused("gradient_checkpointing_policy", "gradient_checkpointing is false")
    if given("data_seed") and not values["shuffle_dataset"] and not given("test_size"):
        yield unused("data_seed", "shuffle_dataset is false and test_size holds no rows out")


def _optimizer(values: dict[str, Any], given: Given) -> Iterator[str]:
    optim, schedule = values["optim"], values["lr_scheduler_type"]
    for name in _ADAM:
        if given(name) and name not in OPTIMIZER_FIELDS[optim]:
            yield unused(name, f"optim {optim} does not read it")
    if optim == "schedule_free_adamw":
        if not schedule.startswith("constant"):
            yield (
                "optim schedule_free_adamw averages in place of a falling learning rate, got "
                f"lr_scheduler_type {schedule}: make it constant_with_warmup or constant"
            )
        if values["adam_beta1"] == 0:
            yield "adam_beta1 must be above 0 with optim schedule_free_adamw, got 0.0"
    if given("warmup_steps") and schedule == "constant":
        yield unused("warmup_steps", "use lr_scheduler_type constant_with_warmup")
    if given("num_decay_steps") and schedule != "wsd":
        yield unused("num_decay_steps", f"lr_scheduler_type is {schedule}; make it wsd")
    if given("min_lr_rate") and schedule not in ("cosine_with_min_lr", "wsd"):
        yield unused(
            "min_lr_rate", f"lr_scheduler_type is {schedule}; make it cosine_with_min_lr or wsd"
        )
    if schedule == "cosine_with_min_lr" and values["min_lr_rate"] == 0:
        yield "lr_scheduler_type cosine_with_min_lr needs min_lr_rate above 0; give min_lr_rate"


def _peft(values: dict[str, Any], given: Given) -> Iterator[str]:
    targets, freeze = values["lora_target_modules"], values["freeze"]
    if not values["use_peft"]:
        for name in (*_LORA, "merge_lora"):
            if given(name):
                yield unused(name, "use_peft is false")
    elif freeze is not None:
        yield unused("freeze", "use_peft freezes all weights but the adapters")
    if not targets:
        yield "lora_target_modules must name linear layers, or be all-linear, got none"
    elif "all-linear" in targets and len(targets) > 1:
        yield f"lora_target_modules must be all-linear or names, got {','.join(targets)}"
    try:
        re.compile(freeze or "")
    except re.error as error:
        yield f"freeze must be a regular expression, got {quote(freeze)}: {error}"


def _data(values: dict[str, Any], given: Given) -> Iterator[str]:
    if values["dataset_name"] is None:
        for name in (
            "dataset_config",
            "dataset_kwargs",
            "dataset_train_split",
            "dataset_test_split",
            "dataset_text_field",
            "eval_dataset_name",
            "test_size",
        ):
            if name in values and given(name):
                yield unused(name, "without dataset_name the embedded arithmetic set is used")
        return
    if given("test_size") and given("eval_dataset_name"):
        yield "test_size and eval_dataset_name exclude each other: give one of them"
    elif given("test_size") and given("dataset_test_split"):
        yield "test_size and dataset_test_split exclude each other: give one of them"


def _packing(values: dict[str, Any], given: Given) -> Iterator[str]:
    if "packing" not in values:
        return
    if given("truncation_mode") and values["max_length"] is None:
        yield unused("truncation_mode", "max_length is none, so no row is too long")
    if not values["packing"]:
        for name in ("packing_strategy", "eval_packing"):
            if given(name):
                yield unused(name, "packing is false")
        return
    if values["max_length"] is None:
        yield "packing needs max_length: packed rows are that long; give max_length"
    if values["eval_packing"] is False:
        return  # evaluation rows are still cut and padded as unpacked ones are
    if given("truncation_mode") and values["packing_strategy"] != "bfd":
        yield unused(
            "truncation_mode",
            f"packing_strategy {values['packing_strategy']} splits long rows",
        )
    if given("pad_to_multiple_of"):
        yield unused("pad_to_multiple_of", "packed rows are max_length long")


def profile_problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the name of a profile."""
    if values["profile"] == "chat":
        return
    # Only where one is named: it takes numpy.
    from relax.data.profiles import profile_problem

    problem = profile_problem(values["profile"])
    if problem is not None:
        yield problem


def _profile(values: dict[str, Any], given: Given) -> Iterator[str]:
    yield from profile_problems(values)
    samples = "max_completion_length" in values or values["num_samples"]
    if values["stop_sequences"] is not None and not samples:
        yield unused("stop_sequences", "the run samples nothing; give num_samples for previews")
    for sequence in values["stop_sequences"] or ():
        if values["stop_sequences"].count(sequence) > 1:
            yield f"stop_sequences must name each text once, got {quote(sequence)} again"
            return


def _evaluation(values: dict[str, Any], given: Given) -> Iterator[str]:
    if given("eval_steps") and values["eval_strategy"] != "steps":
        yield unused("eval_steps", f"eval_strategy is {values['eval_strategy']}; make it steps")
    asked = values["eval_strategy"] != "no" or values["eval_on_start"]
    held_out = given("eval_dataset_name") or given("test_size") or values["dataset_name"] is None
    if asked or held_out:
        return  # rows that are held out are evaluated at the end in any case
    for name in (
        "dataset_test_split",
        "eval_packing",
        "per_device_eval_batch_size",
        "max_eval_batches",
    ):
        if name in values and given(name):
            yield unused(name, "no row is held out; give eval_dataset_name or test_size")


def _output(values: dict[str, Any], given: Given) -> Iterator[str]:
    strategy, resume = values["save_strategy"], values["resume"]
    if given("save_steps") and strategy != "steps":
        yield unused("save_steps", f"save_strategy is {strategy}; make it steps")
    for name in ("save_total_limit", "save_async"):
        if given(name) and strategy == "no":
            yield unused(name, "save_strategy is no")
    if resume.lower() in ("true", "false", "yes", "no", "1", "0"):
        yield f"resume must be auto, never or the path of a checkpoint, got {resume!r}"
    if given("overwrite_output_dir") and resume == "auto":
        yield "overwrite_output_dir deletes the run that resume auto would go on with; give one"
    if given("allow_config_change") and resume == "never":
        yield unused("allow_config_change", "resume is never")


def _names(known: dict[str, Option], values: dict[str, Any]) -> Iterator[str]:
    for name in values["allow_config_change"]:
        if name not in known:
            yield f"allow_config_change names no field: {name!r}.{suggestion(name, known)}"
