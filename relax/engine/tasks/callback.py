"""Tasks of `relax eval` during training."""

from collections.abc import Mapping
from pathlib import PurePath

import jax

from relax.config import TrainerConfig
from relax.config.tasks import HARNESS
from relax.engine.rows import limits_of
from relax.engine.tasks.likelihood import LikelihoodScorer
from relax.engine.tasks.options import Subject, Task, TaskOptions
from relax.engine.tasks.tasks import make_tasks
from relax.errors import ConfigError
from relax.models.config import TransformerConfig
from relax.sampling import SamplingConfig
from relax.trainers.callback import Callback, Event


class TaskEvaluation(Callback):
    """Evaluates the model on tasks with every evaluation, as `tasks/<task>/<metric>`.

    The tasks see the weights that an evaluation sees, and nothing of them enters the state of the
    run: a resumed run gets the same numbers.

    Args:
      tasks: see `make_tasks`.
      tokenizer: that of the model.
      end: token ids that end a completion.
      batch_size: texts whose likelihood is computed at a time.
    """

    def __init__(self, tasks: Mapping[str, Task], tokenizer, end: tuple[int, ...], batch_size: int):
        self.tasks, self.tokenizer, self.end = tasks, tokenizer, end
        self.batch_size = batch_size
        self._scorer: LikelihoodScorer | None = None

    def evaluate(self, event: Event) -> dict[str, float]:
        """Metrics and their standard errors, `..._stderr`."""
        trainer, state = event.trainer, event.state
        params = trainer.model_params(state.eval_params, state.frozen)
        if self._scorer is None:
            self._scorer = LikelihoodScorer(trainer.model, params, self.batch_size)
        scorer = self._scorer.with_params(params)
        self._scorer = scorer.with_params(None)  # the next step donates the weights
        subject = Subject(trainer.model, params, self.tokenizer, self.end, scorer)
        metrics: dict[str, float] = {}
        results = [found for task in self.tasks.values() for found in task(subject).items()]
        for name, result in results:
            for metric, (value, error) in result.metrics.items():
                key = f"tasks/{short_name(name)}/{metric}"
                metrics[key] = value
                if error is not None:
                    metrics[f"{key}_stderr"] = error
        return metrics


def short_name(name: str) -> str:
    """The name of a task's results in metrics, without slashes.

    >>> [short_name(n) for n in ("lm_eval/mmlu_law", "data/sums.jsonl", "reasoning_gym/chain_sum")]
    ['mmlu_law', 'sums', 'chain_sum']
    """
    if name.startswith(HARNESS):
        return name.removeprefix(HARNESS).replace("/", "_")
    return PurePath(name).stem


def task_evaluation(
    config: TrainerConfig, tokenizer, model_config: TransformerConfig, end: tuple[int, ...]
) -> TaskEvaluation | None:
    """The callback of a run's `eval_tasks`; None without any.

    Raises:
      ConfigError, DataError: see `make_tasks`; or two tasks have one name in metrics, or the run
        has several processes.
    """
    i, fields = config.inference, config.flat()
    if not i.eval_tasks:
        return None
    if jax.process_count() > 1:
        raise ConfigError(
            f"eval_tasks runs in one process, and this run has {jax.process_count()}: evaluate "
            "its checkpoints with relax eval."
        )
    names = [short_name(name) for name in i.eval_tasks]
    if len({*names}) < len(names):
        raise ConfigError(f"eval_tasks must have different names in metrics, got {names}.")
    most = fields.get("max_completion_length", i.max_new_tokens)

    def sampling(eos: tuple[int, ...], stop: list[str]) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=most, temperature=0.0, eos_token_ids=eos, stop=tuple(stop)
        )

    batch_size = i.per_device_eval_batch_size
    options = TaskOptions(
        rendering=config.profile,
        sampling=sampling,
        seed=config.hyperparams.seed,
        limits=limits_of(config),
        reward_funcs=tuple(i.eval_reward_funcs or fields.get("reward_funcs") or ()),
        limit=i.eval_tasks_limit,
        batch_size=batch_size,
    )
    tasks = make_tasks(i.eval_tasks, options, tokenizer, model_config)
    return TaskEvaluation(tasks, tokenizer, end, batch_size)
