"""EleutherAI's lm_eval: its tasks in `relax eval`, and its own command with the class `relax`."""

import contextlib
import functools
import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relax.config.names import suggestion
from relax.config.tasks import HARNESS
from relax.data.templates import require_template
from relax.engine.tasks.harness import HarnessModel
from relax.engine.tasks.options import Subject, TaskOptions
from relax.engine.tasks.results import Estimate, TaskResult
from relax.errors import ConfigError, DataError, RelaxError

SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # lm_eval's own, so that scores compare
BOOTSTRAP = 1000  # samples behind the standard error of a metric that is no mean


@functools.cache
def model_class() -> type:
    """The class `relax` of lm_eval, which from then on finds it by this name.

    Raises:
      ConfigError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(
            "tasks of lm_eval need the eval extra: pip install 'relax-trainers[eval]'."
        ) from error
    # lm_eval's bootstrap would fork this process, in which JAX has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")

    @register_model("relax")
    class RelaxLM(HarnessModel, LM):
        """`HarnessModel` as lm_eval's kind of model."""

    return RelaxLM


class HarnessTask:
    """A task, a group or a tag of lm_eval.

    Args:
      name: `lm_eval/NAME` or the path of a YAML file.

    Raises:
      ConfigError: lm_eval is not installed, or knows no such task; names the nearest.
      DataError: its data cannot be read, or it needs a chat template that there is not.
    """

    def __init__(self, name: str, options: TaskOptions, tokenizer):
        self.options, chat = options, options.chat
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        if self.chat:
            require_template(tokenizer, f"the prompts of {name!r}")
        self.model_class = model_class()
        manager, own = _manager(), name.removeprefix(HARNESS)
        if name.startswith(HARNESS):
            if own not in manager.task_index:
                hint = suggestion(own, manager.all_tasks, prefix=HARNESS)
                raise ConfigError(
                    f"lm_eval has no task {own!r}.{hint} `lm_eval ls tasks` lists them."
                )
        elif not Path(name).expanduser().is_file():
            raise ConfigError(f"there is no task {name!r}: the file does not exist.")
        else:
            own = str(Path(name).expanduser())
        try:
            found = manager.load([own])
        except Exception as error:  # tasks run code of their own, and datasets raises anything
            line = str(error).strip().partition("\n")[0]
            raise DataError(
                f"the task {name!r} cannot be loaded: {type(error).__name__}: {line}"
            ) from error
        for task in found["tasks"].values():
            shots = task.get_config("num_fewshot")
            if options.num_fewshot is not None and shots != 0:  # 0 in a task is never changed
                shots = options.num_fewshot
            task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        self.tasks = found

    def __call__(self, subject: Subject) -> dict[str, TaskResult]:
        """Evaluates a model.

        Returns:
          The results of the task, or of the group and each of its tasks.
        """
        import lm_eval

        options, notes = self.options, list[str]()
        model = self.model_class(
            subject,
            batch_size=options.batch_size,
            seed=options.seed,
            tell=notes.append,
        )
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with _seeds():
            found = lm_eval.evaluate(
                lm=model,
                task_dict=self.tasks,
                limit=options.limit,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
                system_instruction=options.rendering.system_prompt,
                bootstrap_iters=BOOTSTRAP,
            )
        named = found["results"] | found.get("groups", {})
        return {f"{HARNESS}{name}": _result(name, found, tuple(notes)) for name in named}


def _result(name: str, found: Mapping[str, Any], notes: tuple[str, ...]) -> TaskResult:
    values = found["results"].get(name) or found["groups"][name]
    metrics = {}
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kept}")
        error = float(error) if isinstance(error, int | float) else None
        metrics[metric if kept == "none" else key] = Estimate(float(value), error)
    samples = found.get("samples", {}).get(name, [])
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    about = f"version {version} of lm_eval's task, {shots} examples before each prompt"
    n = found.get("n-samples", {}).get(name, {}).get("effective", len(samples))
    return TaskResult("lm_eval", n, metrics, samples, (about, *notes))


@contextlib.contextmanager
def _seeds():
    """Sets the seeds of tasks that draw from Python or numpy, and restores the state after them."""
    before = random.getstate(), np.random.get_state()
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@functools.cache
def _manager():
    """The index of all tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_lm_eval(arguments: Sequence[str]) -> int:
    """lm_eval's own command, which then knows the model class `relax`.

    Args:
      arguments: those of lm_eval.

    Returns:
      0, or 2 if lm_eval is not installed or the model is refused.
    """
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate

        before, sys.argv = sys.argv, ["relax lm_eval", *arguments]
        try:
            cli_evaluate()
        finally:
            sys.argv = before
    except RelaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
