"""The configuration of `relax eval`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values
from relax.config.schema import LimitsConfig, RenderingConfig
from relax.config.settings import Settings
from relax.config.tasks import is_harness_task
from relax.tools.sample.config import SampleModelConfig, SamplingSection


@dataclass(slots=True, kw_only=True)
class TasksConfig:
    """Tasks, and the output file."""

    tasks: list[str] = option(
        [],
        "Files of rows, reasoning_gym/NAME, lm_eval/NAME or .yaml files of lm_eval; see "
        "docs/after.md.",
    )
    num_fewshot: int | None = option(
        None, "Examples before each prompt of lm_eval's tasks; none = the task's own.", at_least=0
    )
    limit: int | None = option(None, "Rows of each task, from its first; none = all.", at_least=1)
    reward_funcs: list[str] = option(
        [], "Reward functions of files with prompts, as in training: built-in names or paths."
    )
    reward_kwargs: dict = option(
        {}, 'Parameters of reward functions: {"name": {"parameter": value}}.'
    )
    chat: bool | None = option(
        None, "Apply the chat template to text prompts; none = yes if the tokenizer has one."
    )
    eval_batch_size: int = option(16, "Texts whose likelihood is computed at a time.", at_least=1)
    output_file: str | None = option(None, "JSON file of results and samples; none = a table only.")


def _problems(v: Values) -> Iterator[str]:
    if v["model_name_or_path"] is None:
        yield "model_name_or_path must name a model, got none"
    if not v["tasks"]:
        yield "tasks must name a file, reasoning_gym/NAME or lm_eval/NAME, got none"
    if len({*v["tasks"]}) < len(v["tasks"]):
        yield f"tasks must differ, got {','.join(v['tasks'])}"


@dataclass(slots=True, kw_only=True)
class EvalConfig(Settings):
    """Evaluate a model on tasks."""

    algorithm: ClassVar[str] = "eval"
    positional: ClassVar[str] = "model_name_or_path"
    examples: ClassVar[tuple[str, ...]] = (
        "DIR --tasks prompts.jsonl --reward_funcs exact_match --output_file results.json",
        "DIR --tasks reasoning_gym/chain_sum,choices.jsonl,texts.txt",
        "DIR --tasks lm_eval/arc_easy,lm_eval/gsm8k --num_fewshot 5",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)
    no_effect: ClassVar[tuple[NoEffect, ...]] = (
        NoEffect(
            "top_k top_p min_p seed num_return_sequences",
            lambda v: v["temperature"] == 0,
            "temperature 0 is greedy",
        ),
        NoEffect(
            "max_new_tokens min_new_tokens repetition_penalty stop temperature reward_funcs",
            lambda v: bool(v["tasks"]) and all(map(is_harness_task, v["tasks"])),
            "lm_eval's tasks have generation settings and metrics of their own",
        ),
        NoEffect(
            "num_fewshot",
            lambda v: not any(map(is_harness_task, v["tasks"])),
            "none of the tasks is lm_eval's",
        ),
    )

    model: SampleModelConfig = section(SampleModelConfig)
    tasks: TasksConfig = section(TasksConfig)
    profile: RenderingConfig = section(RenderingConfig)
    limits: LimitsConfig = section(LimitsConfig)
    sampling: SamplingSection = section(SamplingSection, temperature=0.0, seed=0)
