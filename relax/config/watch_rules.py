"""Interpretation of options about evaluation, trackers and profiling."""

import re
from collections.abc import Mapping
from typing import Any

TRACKERS = ("tensorboard", "wandb", "trackio")
EVALUATION_METRIC = re.compile(r"(eval|test)_.+")


def profile_window(text: str) -> tuple[int, int]:
    """Parses the first and the last step of a window, both inclusive.

    >>> profile_window("10:15")
    (10, 15)
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"must be FIRST:LAST, such as 10:15, counted from 1, got {text!r}")
    return first, last


def is_reference(spec: str) -> bool:
    """Whether a text has the form of a class name: in a file, or in a package."""
    return bool(re.fullmatch(r".+\.py:[^\W\d]\w*|[^\W\d]\w*(\.[^\W\d]\w*)+", spec))


def best_metric(values: Mapping[str, Any], algorithm: str) -> str:
    """The metric that selects the best state: the configured one, or the algorithm's."""
    rewarded = algorithm in ("grpo", "rl", "ppo", "online_dpo")
    return values["metric_for_best_model"] or ("eval_reward" if rewarded else "eval_loss")


def is_greater_better(values: Mapping[str, Any], metric: str) -> bool:
    """Whether a higher value of the metric is better."""
    asked = values["greater_is_better"]
    return not metric.endswith("loss") if asked is None else asked


def keeps_best(values: Mapping[str, Any]) -> bool:
    """Whether a run keeps its best state."""
    return values["metric_for_best_model"] is not None or values["load_best_model_at_end"]
