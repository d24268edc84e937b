"""Evaluates a model on tasks, and writes the results."""

import json
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from relax.config.text import nan_to_null
from relax.engine.model_source import ModelSource
from relax.engine.rows import limits_of
from relax.engine.tasks import Subject, TaskOptions, make_tasks
from relax.engine.tasks.likelihood import LikelihoodScorer
from relax.engine.tasks.results import TaskResult, table, to_json
from relax.errors import ConfigError
from relax.files import atomic_write
from relax.tools.evaluate.config import EvalConfig
from relax.tools.sample.sample import sampling_config


def evaluate(config: EvalConfig) -> dict[str, TaskResult]:
    """Evaluates the model of a configuration, prints a table, and writes `output_file`.

    Returns:
      The results by task, in the order of `tasks`.

    Raises:
      ConfigError, DataError, ModelLoadError: a task, a row or the model is wrong; all tasks are
        checked before the model is loaded.
    """
    m, t = config.model, config.tasks
    output = None if t.output_file is None else Path(t.output_file).expanduser()
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"output_file must be in a directory that exists, got '{output}'.")
    source = ModelSource.find(m.model_name_or_path)
    tokenizer = source.tokenizer(config.profile.chat_template_path)
    source.check_tokens(tokenizer)
    options = TaskOptions(
        rendering=config.profile,
        sampling=partial(sampling_config, config.sampling),
        seed=config.sampling.seed or 0,
        limits=limits_of(config),
        reward_funcs=tuple(t.reward_funcs),
        reward_kwargs=t.reward_kwargs,
        limit=t.limit,
        num_fewshot=t.num_fewshot,
        chat=t.chat,
        batch_size=t.eval_batch_size,
    )
    tasks = make_tasks(t.tasks, options, tokenizer, source.model_config)
    model, params = source.load(jnp.dtype(m.dtype), param_dtype=jnp.dtype(m.param_dtype))
    scorer = LikelihoodScorer(model, params, t.eval_batch_size)
    subject = Subject(model, params, tokenizer, source.end_tokens(tokenizer), scorer)
    results: dict[str, TaskResult] = {}
    for task in tasks.values():
        results |= (found_here := task(subject))
        for name, result in found_here.items():
            for note in result.notes:
                print(f"note: {name}: {note}", file=sys.stderr)
    print(table(results))
    if output is not None:
        # Columns from parquet may hold dates.
        made = nan_to_null(to_json(results, config.to_dict()))
        text = json.dumps(made, indent=2, ensure_ascii=False, default=str)
        atomic_write(output, (text + "\n").encode())
    return results
