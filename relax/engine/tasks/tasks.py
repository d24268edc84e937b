"""Makes tasks by their names."""

from collections.abc import Sequence
from functools import partial

from relax.config.tasks import is_harness_task
from relax.engine.tasks.options import Subject, Task, TaskOptions
from relax.engine.tasks.results import TaskResult
from relax.engine.tasks.row_tasks import RowTask, row_task
from relax.errors import ErrorList
from relax.models.config import TransformerConfig


def make_tasks(
    names: Sequence[str], options: TaskOptions, tokenizer, config: TransformerConfig
) -> dict[str, Task]:
    """Reads and checks the data of all tasks, before a model is loaded.

    Args:
      names: files of rows, `reasoning_gym/NAME`, `lm_eval/NAME`, or YAML files of lm_eval.
      config: that of the model.

    Returns:
      A function for each, in their order, which evaluates a model.

    Raises:
      ConfigError, DataError: all problems of all tasks together.
    """
    found, tasks = ErrorList(), {}
    for name in names:
        with found.catch():
            tasks[name] = _make(name, options, tokenizer, config)
    found.raise_all()
    return tasks


def _make(name: str, options: TaskOptions, tokenizer, config: TransformerConfig) -> Task:
    if is_harness_task(name):
        from relax.engine.tasks.harness_tasks import HarnessTask  # needs an extra

        return HarnessTask(name, options, tokenizer)
    return partial(_named, name, row_task(name, options, tokenizer, config))


def _named(name: str, evaluate: RowTask, subject: Subject) -> dict[str, TaskResult]:
    return {name: evaluate(subject)}
