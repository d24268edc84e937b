"""The options that all algorithms of reinforcement learning share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, section
from relax.config.rules import NoEffect, Values, needs, warns
from relax.config.run_rules import NO_ROW
from relax.config.schema import Dtype, Hyperparams, PeftConfig, TrainerConfig


@dataclass(slots=True, kw_only=True)
class SamplingOptions:
    """Sampling of tokens."""

    temperature: float = option(1.0, "Sampling temperature, also applied in the loss.", above=0)
    top_k: int = option(0, "Sample from the k most likely tokens; 0 = off.", at_least=0)
    top_p: float = option(
        1.0, "Nucleus sampling: total probability of the tokens kept; 1 = off.", above=0, at_most=1
    )
    min_p: float = option(
        0.0, "Minimum probability, as a fraction of the highest; 0 = off.", at_least=0, at_most=1
    )
    repetition_penalty: float = option(
        1.0, "Penalty on tokens that already occurred; 1 = off.", above=0
    )


@dataclass(slots=True, kw_only=True)
class CompletionsConfig(SamplingOptions):
    """Sampling of completions."""

    num_generations: int = option(8, "Completions per prompt.", at_least=1)
    max_completion_length: int = option(512, "Maximum tokens of a completion.", at_least=1)
    recompute_old_logprobs: bool = option(
        False,
        "Recompute the log-probabilities of samples by a forward pass; always on with top_k, "
        "top_p, min_p, repetition_penalty, async_rollouts or a rollout_dtype of its own.",
    )
    rollout_dtype: Dtype | None = option(
        None, "Data type of weights and cache in rollouts; none = dtype."
    )
    async_rollouts: int = option(
        0,
        "Updates by which rollouts may be older than the policy, drawn beside the updates; "
        "0 = drawn from the policy itself.",
        at_least=0,
    )
    rollout_devices: int = option(
        0, "Devices for async_rollouts alone, the last ones; 0 = those of the updates.", at_least=0
    )
    rollout_reuse: bool = option(
        False,
        "In later epochs, verify a prompt's last completions in one pass and sample only what "
        "changed.",
    )
    importance_sampling_correction: bool = option(
        True, "Correct updates for rollouts of another rollout_dtype or of an older policy."
    )
    importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = option(
        "token_truncate",
        "Ratio of trainer to sampler per token or sequence; above the bound truncated, or masked.",
    )
    importance_sampling_clip_max: float = option(3.0, "Upper bound of that ratio.", above=0)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; none = num_generations.", at_least=1
    )
    eval_temperature: float | None = option(
        None, "Sampling temperature in evaluation; 0 = greedy; none = temperature.", at_least=0
    )
    rollout_slots: int = option(64, "Completions decoded at a time.", at_least=1)


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """Reward functions."""

    reward_funcs: list[str] = option(
        [],
        "Reward functions: built-in names, package.module.function, path/to/file.py:function, "
        "or model:DIR.",
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each reward function; none = all 1."
    )
    reward_kwargs: dict = option(
        {}, 'Parameters of reward functions: {"name": {"parameter": value}}.'
    )
    reward_timeout_s: float = option(
        30.0, "Time limit of one call of a reward function, in seconds.", above=0
    )
    reward_workers: int = option(1, "Number of reward worker processes.", at_least=1)
    max_reward_errors: float = option(
        0.1, "Fraction of completions on which a reward function may fail.", at_least=0, at_most=1
    )
    pass_reward: float = option(
        1.0, "Reward from which a completion counts as passed, for pass@k and curriculum."
    )
    curriculum: Literal["pass_rate"] | None = option(
        None, "Order of prompts: pass_rate = those always or never solved come seldom; none = all."
    )
    curriculum_floor: float = option(
        0.1,
        "How often such a prompt comes, as a share of one solved half the time.",
        above=0,
        at_most=1,
    )
    log_completions: bool = option(False, "Print a table of completions every logging_steps.")
    num_completions_to_print: int = option(8, "Number of completions in that table.", at_least=1)


@dataclass(slots=True, kw_only=True)
class EpisodesConfig:
    """Tools and environments of several turns."""

    tools: list[str] = option(
        [],
        "Functions that the model may call: package.module.function or "
        "path/to/file.py:function[,function].",
    )
    environment_factory: str | None = option(
        None,
        "Environment that answers the model: calculator, package.module.Class or "
        "path/to/file.py:Class.",
    )
    max_tool_calling_iterations: int | None = option(
        None, "Turns of an episode that may call tools; none = any number.", at_least=1
    )
    tool_format: str | None = option(
        None, "How the model writes calls of tools; none = as its chat template does."
    )
    tool_timeout_s: float = option(
        30.0, "Time limit of one call of a tool or an environment, in seconds.", above=0
    )
    tool_workers: int = option(
        32, "Calls of tools and environments that run at a time.", at_least=1
    )


def broken_groups(v: Values, micro_batches: int) -> Iterator[str]:
    """Refuses a rollout of incomplete groups, with batch sizes that would fit."""
    group, rows = v["num_generations"], v["per_device_train_batch_size"]
    if rows * micro_batches % group == 0:
        return
    below = rows * micro_batches // group * group
    sizes = [n // micro_batches for n in (below, below + group) if n and n % micro_batches == 0]
    yield (
        f"the completions of a rollout must be whole groups, and num_generations {group} does not "
        f"divide per_device_train_batch_size {rows} x {micro_batches} micro-batches; "
        f"per_device_train_batch_size {' or '.join(map(str, sizes or [group]))} would fit"
    )


def broken_age(v: Values, updates: int) -> Iterator[str]:
    """Refuses an age of rollouts that is not one of whole rollouts.

    Args:
      updates: updates per rollout.
    """
    age = v["async_rollouts"]
    if age % updates:
        yield (
            f"async_rollouts must be a multiple of the {updates} updates of a rollout, got {age}; "
            f"{age // updates * updates + updates} would do"
        )


def generation_problems(v: Values) -> Iterator[str]:
    """Contradictions of sampling in evaluation and of the reward functions, of which some exist."""
    yield from sampling_problems(v)
    unscored = v["environment_factory"] is None and v.get("agent") is None
    if not v["reward_funcs"] and unscored:
        yield "reward_funcs must name a reward function, got none; see docs/rewards.md"


def sampling_problems(v: Values) -> Iterator[str]:
    """Contradictions of sampling in evaluation and of the reward functions."""
    functions, weights = v["reward_funcs"], v["reward_weights"]
    yield from _reuse_problems(v)
    if v["num_generations_eval"] not in (None, 1) and v["eval_temperature"] == 0:
        yield "eval_temperature 0 always gives the same completion; set num_generations_eval 1"
    if weights is not None and len(weights) != len(functions):
        yield (
            f"reward_weights must be one per reward function, got {len(weights)} for "
            f"{len(functions)}"
        )


def _reuse_problems(v: Values) -> Iterator[str]:
    if not v["rollout_reuse"]:
        return
    for name in ("agent", "tools", "environment_factory"):
        if v.get(name):
            yield f"rollout_reuse excludes {name}: it is for completions of one turn"
    if v["async_rollouts"]:
        yield "rollout_reuse excludes async_rollouts, which draws ahead of the updates"
    if v["repetition_penalty"] != 1:
        yield "rollout_reuse excludes repetition_penalty, which a packed pass does not have"


def one_update(v: Values, updates: int) -> bool:
    """Whether every step starts from the policy that generated the completions."""
    return updates <= 1 and not (v["use_peft"] and v["lora_dropout"]) and v["dtype"] == "float32"


# Options of a loss that reads the sampler's log-probabilities.
READS_SAMPLER = (
    "recompute_old_logprobs importance_sampling_correction importance_sampling_mode "
    "importance_sampling_clip_max async_rollouts rollout_devices"
)
GENERATION = (
    warns(
        "recompute_old_logprobs",
        lambda v: v.given("top_k", "top_p", "min_p", "repetition_penalty"),
        "top_k, top_p, min_p and repetition_penalty always recompute them",
    ),
    warns("rollout_dtype", lambda v: v["rollout_dtype"] == v["dtype"], "it is the dtype already"),
    needs("rollout_devices", "async_rollouts"),
    warns(
        "rollout_reuse",
        lambda v: v["num_train_epochs"] == 1 and v["max_steps"] < 0,
        "no prompt comes twice in one epoch; raise num_train_epochs",
    ),
    warns(
        "importance_sampling_correction importance_sampling_mode importance_sampling_clip_max",
        lambda v: not v["rollout_dtype"] and not v["async_rollouts"],
        "rollout_dtype is none and async_rollouts is 0; give one of them",
    ),
    needs(
        "importance_sampling_mode importance_sampling_clip_max",
        "importance_sampling_correction",
        warn=True,
    ),
    NoEffect("num_generations_eval eval_temperature", lambda v: not v.holds_out(), NO_ROW),
    NoEffect("pass_reward", lambda v: not v.holds_out() and not v["curriculum"], NO_ROW),
    needs("curriculum_floor", "curriculum"),
    warns(
        "reward_workers",
        lambda v: v["reward_workers"] > max(len(v["reward_funcs"]), 1),
        "more processes than reward functions; lower it",
    ),
    needs("num_completions_to_print", "log_completions"),
    NoEffect(
        "max_tool_calling_iterations tool_format tool_timeout_s tool_workers",
        lambda v: not v["tools"] and v["environment_factory"] is None,
        "there are no tools; give tools or environment_factory",
    ),
)


@dataclass(slots=True, kw_only=True)
class RLConfig(TrainerConfig):
    """The sections that GRPO and PPO share."""

    examples: ClassVar[tuple[str, ...]] = (
        "--model_name_or_path DIR --dataset_name prompts.jsonl --reward_funcs exact_match",
    )
    # Defaults of the run without flags, which learns addition from rewards in a few minutes.
    demo: ClassVar[dict[str, Any]] = {
        "max_completion_length": 6,
        "reward_funcs": ["exact_match"],
        "eval_strategy": "steps",
        "eval_on_start": True,
        "per_device_eval_batch_size": 500,
        "num_generations_eval": 1,
        "eval_temperature": 0.0,
        "rollout_slots": 512,
    }
    no_effect: ClassVar[tuple[NoEffect, ...]] = TrainerConfig.no_effect + GENERATION

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
    # The sampler has no dropout; in the loss it would add noise to the ratio.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0)
    rollout: CompletionsConfig = section(CompletionsConfig)
    reward: RewardConfig = section(RewardConfig)
    episodes: EpisodesConfig = section(EpisodesConfig)
