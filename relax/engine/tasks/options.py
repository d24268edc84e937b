"""Options of tasks, and the model that is evaluated."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from relax import data
from relax.config.schema import RenderingConfig
from relax.engine.tasks.likelihood import LikelihoodScorer
from relax.engine.tasks.results import TaskResult
from relax.models.transformer import Transformer
from relax.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is evaluated.

    Attributes:
      model, params: as `load_pretrained` gives them.
      tokenizer: its tokenizer.
      end: token ids that end a completion.
      scorer: computes likelihoods.
    """

    model: Transformer
    params: Any
    tokenizer: Any
    end: tuple[int, ...]
    scorer: LikelihoodScorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of all tasks.

    Attributes:
      rendering: profile, system prompt and chat template of prompts.
      sampling: makes the sampler's options from the ids that end a completion and the profile's
        stop sequences.
      seed: of completions.
      limits: on rows and chat templates.
      reward_funcs, reward_kwargs: functions that score completions, and their parameters.
      limit: rows of each task, from its first; None: all.
      num_fewshot: examples before each prompt of lm_eval's tasks; None: as the task says.
      chat: apply the chat template to text prompts; None: if the tokenizer has one.
      batch_size: texts whose likelihood is computed at a time.
    """

    rendering: RenderingConfig
    sampling: Callable[[tuple[int, ...], list[str]], SamplingConfig]
    seed: int = 0
    limits: data.Limits = data.Limits()
    reward_funcs: tuple[str, ...] = ()
    reward_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool | None = None
    batch_size: int = 16


Task = Callable[[Subject], dict[str, TaskResult]]  # results by name: one, or those of a group
