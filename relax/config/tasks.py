"""Names of evaluation tasks."""

HARNESS = "lm_eval/"


def is_harness_task(name: str) -> bool:
    """Whether a task is one of lm_eval: `lm_eval/NAME`, or a YAML file of that form.

    >>> [is_harness_task(name) for name in ("lm_eval/gsm8k", "mine.yaml", "rows.jsonl")]
    [True, True, False]
    """
    return name.startswith(HARNESS) or name.endswith((".yaml", ".yml"))
