"""The configuration of distillation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, section
from relax.config.rl import (
    READS_SAMPLER,
    CompletionsConfig,
    RLConfig,
    broken_groups,
    sampling_problems,
)
from relax.config.rules import NoEffect, Rule, Values, needs
from relax.config.schema import OutputConfig

RESHAPING = ("top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(slots=True, kw_only=True)
class DistillSection:
    """Teachers, source of the completions, and loss of distillation."""

    teacher_model_name_or_path: list[str] = option(
        [],
        "Teachers: model directories or hub names; none = the model before training, which reads "
        "the column teacher_prompt.",
    )
    teacher_weights: list[float] | None = option(None, "Weight of each teacher; none = all 1.")
    teacher_logprobs: str | None = option(
        None,
        "Directory of a teacher's stored log-probabilities, written by relax distill prepare.",
    )
    lmbda: float = option(
        0.5,
        "Fraction of the rows whose completions the student writes; the others have theirs from "
        "the data.",
        at_least=0,
        at_most=1,
    )
    beta: float = option(
        0.5,
        "Divergence: 0 = forward KL, 1 = reverse KL, between them the generalised Jensen-Shannon "
        "divergence.",
        at_least=0,
        at_most=1,
    )
    loss_top_k: int = option(
        0, "Compare the teacher's k most likely tokens and the rest as one; 0 = all.", at_least=0
    )
    distill_mode: Literal["divergence", "policy_gradient"] = option(
        "divergence",
        "Minimise the divergence of whole distributions, or take the KL of sampled tokens as their "
        "reward.",
    )
    gamma: float = option(
        0.0, "Discount factor of later tokens in policy_gradient.", at_least=0, at_most=1
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _distill(v: Values) -> Iterator[str]:
    teachers, weights = v["teacher_model_name_or_path"], v["teacher_weights"]
    if weights is not None and (len(weights) != len(teachers) or min(weights) <= 0):
        yield (
            f"teacher_weights must be one above 0 per teacher, got {weights} for {len(teachers)} "
            "teachers"
        )
    if v["teacher_logprobs"] is not None and (v["lmbda"] or not v["loss_top_k"]):
        yield (
            "teacher_logprobs holds the loss_top_k most likely tokens for completions of the data, "
            f"got loss_top_k {v['loss_top_k']} and lmbda {v['lmbda']}; give loss_top_k, and lmbda 0"
        )
    if v["lmbda"] < 1 and v["num_generations"] > 1:
        yield (
            "num_generations above 1 needs lmbda 1: rows of the data have one completion, got "
            f"lmbda {v['lmbda']}"
        )
    if v["distill_mode"] == "policy_gradient":
        if v["lmbda"] < 1:
            yield f"policy_gradient needs lmbda 1, the student's own completions, got {v['lmbda']}"
        if v.given(*RESHAPING):
            yield f"policy_gradient samples from the policy itself; remove {', '.join(RESHAPING)}"


def _groups(v: Values) -> Iterator[str]:
    yield from broken_groups(v, v["gradient_accumulation_steps"])


def _writes_nothing(v: Values) -> bool:
    return not v["lmbda"] and not v["reward_funcs"] and v["environment_factory"] is None


DISTILL = (
    needs("teacher_weights", "teacher_model_name_or_path"),
    needs("gamma", "distill_mode", "policy_gradient"),
    NoEffect(
        "beta loss_top_k",
        lambda v: v["distill_mode"] == "policy_gradient",
        "distill_mode is policy_gradient",
        warn=True,
    ),
    NoEffect(
        READS_SAMPLER,
        lambda v: True,
        "the loss reads no log-probabilities of the sampler",
    ),
    NoEffect(
        f"{' '.join(RESHAPING)} max_completion_length rollout_slots rollout_reuse "
        "num_generations_eval eval_temperature",
        _writes_nothing,
        "the student writes nothing; give lmbda or reward_funcs",
    ),
    NoEffect("curriculum", lambda v: True, "rewards of distillation are metrics; use GRPO or PPO"),
    NoEffect(
        "tools",
        lambda v: bool(v["tools"]),
        "the prompts of distillation are rendered without them; give an environment_factory",
    ),
    NoEffect(
        "reward_weights reward_kwargs pass_reward",
        lambda v: not v["reward_funcs"] and v["environment_factory"] is None,
        "there are no rewards; give reward_funcs",
    ),
)


@dataclass(slots=True, kw_only=True)
class DistillConfig(RLConfig):
    """Distillation: a student learns the token distributions of a teacher."""

    algorithm: ClassVar[str] = "distill"
    examples: ClassVar[tuple[str, ...]] = (
        "--model_name_or_path DIR --teacher_model_name_or_path DIR --dataset_name rows.jsonl",
    )
    demo: ClassVar[dict[str, Any]] = RLConfig.demo | {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 128,
        "max_steps": 600,
        "logging_steps": 20.0,
        "eval_steps": 100.0,
        "beta": 0.0,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_groups, sampling_problems, _distill)
    no_effect: ClassVar[tuple[NoEffect, ...]] = DISTILL + RLConfig.no_effect

    output: OutputConfig = section(OutputConfig, output_dir="outputs/distill")
    rollout: CompletionsConfig = section(CompletionsConfig, num_generations=1)
    distill: DistillSection = section(DistillSection)
