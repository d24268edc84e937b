"""The rules of what watches a run: previews, the best state, early stopping, trackers, profiles."""

import re
from collections.abc import Callable, Iterator
from typing import Any

TRACKERS = ("tensorboard", "wandb", "trackio")
_EVALUATION_METRIC = re.compile(r"(eval|test)_.+")


def problems(values: dict[str, Any], given: Callable[[str], bool]) -> Iterator[str]:
    """What has no effect or cannot be meant, one sentence each."""
    yield from _previews(values, given)
    yield from _best(values, given)
    yield from _trackers(values, given)
    if values["profile_steps"] is not None:
        try:
            profile_window(values["profile_steps"])
        except ValueError as error:
            yield f"profile_steps {error}"
    for spec in values["callbacks"]:
        if not is_reference(spec):
            yield f"callbacks must be path/to/file.py:Class or package.module.Class, got {spec!r}"


def profile_window(text: str) -> tuple[int, int]:
    """The first and the last update of a window, both of them in it.

    >>> profile_window("10:15")
    (10, 15)
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"must be FIRST:LAST, such as 10:15, counted from 1, got {text!r}")
    return first, last


def is_reference(spec: str) -> bool:
    """Whether a text can name a class: in a file, or in a package."""
    return bool(re.fullmatch(r".+\.py:[^\W\d]\w*|[^\W\d]\w*(\.[^\W\d]\w*)+", spec))


def holds_out(values: dict[str, Any], given: Callable[[str], bool]) -> bool:
    """Whether there are rows to evaluate on."""
    asked = values["eval_strategy"] != "no" or values["eval_on_start"]
    named = given("eval_dataset_name") or given("test_size")
    return asked or named or values["dataset_name"] is None


def best_metric(values: dict[str, Any], algorithm: str) -> str:
    """The metric by which states are compared: the one named, or the algorithm's."""
    rewarded = algorithm in ("grpo", "rl", "ppo")
    return values["metric_for_best_model"] or ("eval_reward" if rewarded else "eval_loss")


def is_greater_better(values: dict[str, Any], metric: str) -> bool:
    asked = values["greater_is_better"]
    return not metric.endswith("loss") if asked is None else asked


def keeps_best(values: dict[str, Any]) -> bool:
    """Whether a run keeps the best of its states."""
    return values["metric_for_best_model"] is not None or values["load_best_model_at_end"]


def _previews(values, given) -> Iterator[str]:
    if values["num_samples"] and not holds_out(values, given):
        yield _unused("num_samples", "no row is held out; give eval_dataset_name or test_size")
    if given("max_new_tokens"):
        if "max_completion_length" in values:
            yield _unused("max_new_tokens", "max_completion_length says how long completions are")
        elif not values["num_samples"]:
            yield _unused("max_new_tokens", "num_samples is 0")


def _best(values, given) -> Iterator[str]:
    metric = values["metric_for_best_model"]
    if metric is not None and not _EVALUATION_METRIC.fullmatch(metric):
        yield (
            f"metric_for_best_model must be of an evaluation, such as eval_loss, got {metric!r}; "
            f"eval_{metric} may be meant"
        )
    patient = values["early_stopping_patience"] is not None
    compares = keeps_best(values) or patient
    if compares and values["eval_strategy"] == "no":
        name = "early_stopping_patience" if patient else "load_best_model_at_end"
        name = "metric_for_best_model" if metric is not None else name
        yield f"{name} compares evaluations, and eval_strategy is no; make it steps or epoch"
    if given("greater_is_better") and not compares:
        yield _unused("greater_is_better", "nothing is compared; give metric_for_best_model")
    if given("early_stopping_threshold") and not patient:
        yield _unused("early_stopping_threshold", "early_stopping_patience is none")


def _trackers(values, given) -> Iterator[str]:
    for name in values["report_to"]:
        if values["report_to"] != ["none"] and name not in TRACKERS and not is_reference(name):
            yield (
                f"report_to must be of {', '.join(TRACKERS)}, or path/to/file.py:Class, got "
                f"{name!r}"
            )
    if len(set(values["report_to"])) < len(values["report_to"]):
        yield f"report_to must name each tracker once, got {','.join(values['report_to'])}"
    if given("run_name") and not set(values["report_to"]) - {"tensorboard", "none"}:
        yield _unused("run_name", "no tracker reads it; report_to wandb or trackio does")


def _unused(name: str, reason: str) -> str:
    return f"{name} has no effect: {reason}"
