"""Distillation: from a configuration to a model directory."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from relax.config import DistillConfig
from relax.data import render
from relax.data.distillation import (
    TEACHER_PROMPT,
    DistillationLoader,
    DistillationRows,
    prepare_distillation,
)
from relax.data.top_logprobs import read_set
from relax.engine.model_source import ModelSource
from relax.engine.recipes import rl
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.rows import Data, Sources, data_seed, limits_of, rows_plan
from relax.engine.run import Run, RunResult
from relax.errors import ConfigError, DataError, ErrorList
from relax.models import TransformerConfig
from relax.rewards import RewardRunner
from relax.sampling.config import max_positions
from relax.trainers import DistillationTrainer, Teacher

HEADLINE = ("eval_loss", "eval_reward", "eval_pass@1", "teacher_pass@1")
TEACHER_SHARE = 0.97  # share of right sums at which the training of the demo teacher ends


def train_distill(config: DistillConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a student on the token distributions of its teachers.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer, the student, and the teachers, whose tokens must be the student's.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(
            has_initial_reference=config.distill.teacher_logprobs is None
        )
        sources = run.attempt(find_teachers, config, tokenizer)

        # 2. The rewards, if any: for metrics alone; and what answers the student, if anything.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, and completions for the share of rows that is off-policy.
        data = run.load_data(
            read_distill_data,
            tokenizer,
            model,
            kind="completions" if config.distill.lmbda < 1 else "prompts",
            demo_rows=with_answers,
            rewards=rewards,
            teachers=sources,
        )
        teachers = load_teachers(run, sources, model, tokenizer)

        # 4. The trainer.
        trainer = DistillationTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            teachers=teachers,
            reward_funcs=rewards,
            **distill_options(config),
            **rl.rollout_options(run, data, rollout_sizes(run.config), tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, write, update, evaluate, save; then the model directory.
        return run.train(trainer, data, headline=HEADLINE, evaluate_demo=evaluate_teacher)


def rollout_sizes(config: DistillConfig) -> rl.Sizes:
    """Sizes of updates; each has its own completions."""
    return rl.Sizes.make(config, updates_per_pass=1, passes=1)


def distill_options(config: DistillConfig) -> dict[str, Any]:
    """The options of `DistillationTrainer` that are fields of `config.distill`."""
    options = dataclasses.asdict(config.distill)
    for name in ("teacher_model_name_or_path", "teacher_weights"):
        options.pop(name)
    return options | {"precomputed": options.pop("teacher_logprobs") is not None}


def find_teachers(config: DistillConfig, tokenizer) -> list[ModelSource]:
    """Finds the files of the teachers.

    Raises:
      ConfigError: the tokens of one are not the student's.
    """
    found = [ModelSource.find(path) for path in config.distill.teacher_model_name_or_path]
    for teacher in found:
        theirs = teacher.tokenizer().get_vocab()
        if tokenizer is not None and theirs != tokenizer.get_vocab():
            raise ConfigError(
                f"a teacher must have the student's tokens, but of those of '{teacher.path}' "
                f"{len(theirs.items() ^ tokenizer.get_vocab().items())} differ. Let it write "
                "completions (relax sample) and fine-tune the student on them (relax sft)."
            )
    return found


def load_teachers(
    run: Run[DistillConfig], sources: Sequence[ModelSource], model, tokenizer
) -> list[Teacher]:
    """Loads the teachers; that of the demo is fine-tuned on sums first.

    There are none where their log-probabilities are stored.
    """
    if run.config.distill.teacher_logprobs is not None:
        return []
    m, weights = run.config.model, run.config.distill.teacher_weights
    if not sources and run.source.path is None:
        plain = model.clone(lora=None)
        return [Teacher(plain, pretrain_demo(run, plain, tokenizer, None, TEACHER_SHARE, stream=1))]
    loaded = []
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        one, params = source.load(jnp.dtype(m.dtype), param_dtype=jnp.dtype(m.param_dtype))
        loaded.append(Teacher(one.clone(attn_implementation=m.attn_implementation), params, weight))
    return loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillData(Data):
    """Data of distillation.

    Attributes:
      rows: the tokenised rows of each set by title.
    """

    rows: dict[str, DistillationRows]


def read_distill_data(
    config: DistillConfig,
    tokenizer,
    *,
    model_config: TransformerConfig,
    sources: Sources,
    rewards: RewardRunner,
    teachers: Sequence[ModelSource],
) -> DistillData:
    """Tokenises the rows of every set and splits them into the items of updates.

    Raises:
      RelaxError: all problems of all sets together.
    """
    lmbda, room = config.distill.lmbda, config.rollout.max_completion_length
    configs = [model_config, *(teacher.model_config for teacher in teachers)]
    loaders, reports, all_rows, digest = {}, {}, {}, 0
    found = ErrorList()
    for name, rows in sources.sets.items():
        with found.catch():
            made = prepare_distillation(
                rows,
                tokenizer,
                with_prompts=bool(lmbda or rewards.names),
                with_completions=lmbda < 1,
                positions=min(max_positions(one)[0] for one in configs),
                room=room,
                system_prompt=sources.system_prompt,
                eos_token=config.data.eos_token,
                vocab_size=model_config.vocab_size,
                limits=limits_of(config),
            )
            _check_teacher(config, made.teacher_prompt_ids)
            rewards.check_rows(made.prompts.rows)
            if name == sources.training:
                rewards.probe(made.prompts.rows, made.prompts.conversational)
            loaders[name] = _loader(config, made, name, training=name == sources.training)
            all_rows[name] = made
            reports[name] = made.report or rl.PromptReport(made.prompts, loaders[name].num_left_out)
            content = json.dumps([[*made.prompts.prompt_ids], made.prompts.rows], default=str)
            digest = zlib.crc32(content.encode(), digest)
            for example in made.examples or ():
                digest = zlib.crc32(example.labels.tobytes(), digest)
    found.raise_all()

    def show(console) -> None:
        for name, report in reports.items():
            examples = config.debug.print_examples if name == sources.training else 0
            if isinstance(report, rl.PromptReport):
                console.rule(name, align="left", style="dim")
                console.print(report.prompts.report(), markup=False)
            else:
                render(report, console, examples, title=name)
        if left_out := loaders[sources.training].num_left_out:
            console.print(f"{left_out} rows of each epoch are dropped: they do not fill an update")

    return DistillData(
        rows=all_rows,
        train=loaders[sources.training],
        eval=sources.eval_loaders(loaders),
        reports=reports,
        digest=f"{digest:08x}",
        plan=f"{rows_plan(config)}, {lmbda:.0%} of them written by the student",
        show=show,
        stop_sequences=sources.stop_sequences,
    )


def with_answers(rows: list[dict]) -> list[dict]:
    """Rows of the demo task with the assistant's reply as the column `answer`, too."""
    return [row | {"answer": row["completion"][0]["content"]} for row in rows]


def evaluate_teacher(console, when: str, trainer, state, data: Data) -> dict[str, float]:
    """Measures the share of held-out sums that the teacher of the demo gets right."""
    if when == "after" or trainer.model.lora is not None or not trainer.reward_names:
        return {}
    teacher = state.frozen["teacher_0"]
    items = enumerate(data.eval)
    parts = [trainer.evaluate_item(state, teacher, item, i)() for i, item in items]
    share = trainer.reduce_evaluation(parts)["pass@1"]
    console.print(f"the teacher gets {share:.1%} of the held-out sums right")
    return {"teacher_pass@1": share}


def _check_teacher(config: DistillConfig, teacher_prompts) -> None:
    d = config.distill
    is_demo = config.model.model_name_or_path is None
    named = d.teacher_model_name_or_path or d.teacher_logprobs or is_demo
    if not named and teacher_prompts is None:
        raise DataError(
            "the student's teacher is itself, and sees the same prompts: give "
            f"--teacher_model_name_or_path DIR, or rows with the column {TEACHER_PROMPT!r}."
        )


def stored_facts(config: DistillConfig) -> dict[str, Any]:
    """What must be the same when log-probabilities are stored and when they are read."""
    d = config.distill
    return {
        "loss_top_k": d.loss_top_k,
        "temperature": config.rollout.temperature,
        "teacher_model_name_or_path": d.teacher_model_name_or_path,
        "teacher_weights": d.teacher_weights,
    }


def _loader(config: DistillConfig, rows: DistillationRows, name: str, *, training: bool):
    directory, stored = config.distill.teacher_logprobs, None
    if directory is not None and rows.examples is not None:
        stored = read_set(directory, name, rows.examples, stored_facts(config))
    if not training:
        size = config.inference.per_device_eval_batch_size
        return DistillationLoader(rows, size, stored=stored, shuffle=False, keep_last=True)
    return DistillationLoader(
        rows,
        rollout_sizes(config).prompts_per_item,
        stored=stored,
        seed=data_seed(config),
        shuffle=config.data.shuffle_dataset,
    )
