"""The configurations of reinforcement learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.dpo import ReferenceSection
from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values, needs, warns
from relax.config.run_rules import NO_ROW
from relax.config.schema import Hyperparams, OutputConfig, PeftConfig, TrainerConfig


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
        "top_p, min_p or repetition_penalty.",
    )
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; none = num_generations.", at_least=1
    )
    eval_temperature: float | None = option(
        None, "Sampling temperature in evaluation; 0 = greedy; none = temperature.", at_least=0
    )
    rollout_slots: int = option(64, "Completions decoded at a time.", at_least=1)


@dataclass(slots=True, kw_only=True)
class RolloutConfig(CompletionsConfig):
    """Sampling of completions, and their reuse in training."""

    steps_per_generation: int | None = option(
        None, "Micro-batches per rollout; none = gradient_accumulation_steps.", at_least=1
    )
    num_iterations: int = option(1, "Passes over the completions of a rollout.", at_least=1)


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """Reward functions."""

    reward_funcs: list[str] = option(
        [],
        "Reward functions: built-in names, package.module.function, path/to/file.py:function, "
        "or model:DIR.",
    )
    environment: str | None = option(
        None,
        "Environment of several turns: calculator, package.module.Class or path/to/file.py:Class.",
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
    pass_reward: float = option(1.0, "Reward from which a completion counts as passed, for pass@k.")
    log_completions: bool = option(False, "Print a table of completions every logging_steps.")
    num_completions_to_print: int = option(8, "Number of completions in that table.", at_least=1)


@dataclass(slots=True, kw_only=True)
class GRPOSection(ReferenceSection):
    """Objective and advantages of GRPO."""

    beta: float = option(0.0, "KL coefficient; 0 disables the reference model.", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k3", "Estimator of the KL divergence per token."
    )
    kl_in_reward: bool = option(
        False, "Subtract the KL penalty from the reward instead of adding it to the loss."
    )
    use_bias_correction_kl: bool = option(
        True, "Multiply the KL penalty per token by the importance ratio."
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "cispo_absolute"] = option(
        "dapo", "Objective and its aggregation over tokens."
    )
    epsilon: float = option(0.2, "Lower clipping range, below 1 - epsilon.", above=0)
    epsilon_high: float | None = option(
        None, "Upper clipping range, above 1 + epsilon_high; none = epsilon.", above=0
    )
    delta: float | None = option(
        None, "Upper bound of the ratio where the advantage is negative; none = no bound.", above=1
    )
    importance_sampling_level: Literal["token", "sequence", "trajectory"] = option(
        "token", "Ratio per token, its geometric mean per sequence (GSPO), or its product (RLOO)."
    )
    scale_rewards: Literal["group", "batch", "none", "rloo"] = option(
        "group",
        "Normalisation of advantages: std of the group or the batch, none, or leave-one-out.",
    )
    mask_truncated_completions: bool = option(
        False, "Exclude completions that reached max_completion_length from the loss."
    )
    entropy_coef: float = option(0.0, "Entropy bonus coefficient.", at_least=0)
    max_resample_rounds: int = option(
        0, "Rounds in which groups of equal rewards are replaced by new prompts (DAPO).", at_least=0
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _rollout(v: Values) -> Iterator[str]:
    accumulation = v["gradient_accumulation_steps"]
    steps = v["steps_per_generation"] or accumulation
    if steps % accumulation:
        yield (
            "steps_per_generation must be a multiple of gradient_accumulation_steps, got "
            f"{steps} and {accumulation}"
        )
    else:
        yield from broken_groups(v, steps)


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


def generation_problems(v: Values) -> Iterator[str]:
    """Contradictions of sampling in evaluation and of the reward functions."""
    functions, weights = v["reward_funcs"], v["reward_weights"]
    if v["num_generations_eval"] not in (None, 1) and v["eval_temperature"] == 0:
        yield "eval_temperature 0 always gives the same completion; set num_generations_eval 1"
    if not functions and v["environment"] is None:
        yield "reward_funcs must name a reward function, got none; see docs/rewards.md"
    if weights is not None and len(weights) != len(functions):
        yield (
            f"reward_weights must be one per reward function, got {len(weights)} for "
            f"{len(functions)}"
        )


def _grpo(v: Values) -> Iterator[str]:
    if v["num_generations"] < 2:
        yield (
            "num_generations must be at least 2, since advantages compare the completions of a "
            f"prompt, got {v['num_generations']}"
        )
    if v["beta"] and v["sync_ref_model"] and (v["use_peft"] or v["freeze"]):
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"


def one_update(v: Values, updates: int) -> bool:
    """Whether every step starts from the policy that generated the completions."""
    return updates <= 1 and not (v["use_peft"] and v["lora_dropout"]) and v["dtype"] == "float32"


def _on_policy(v: Values) -> bool:
    accumulation = max(v["gradient_accumulation_steps"], 1)
    steps = v["steps_per_generation"] or accumulation
    return one_update(v, steps // accumulation * v["num_iterations"])


def _upper_bound(v: Values) -> float:
    """Upper clipping bound of the ratio, without delta."""
    return 1 + (v["epsilon"] if v["epsilon_high"] is None else v["epsilon_high"])


GENERATION = (
    warns(
        "recompute_old_logprobs",
        lambda v: v.given("top_k", "top_p", "min_p", "repetition_penalty"),
        "top_k, top_p, min_p and repetition_penalty always recompute them",
    ),
    NoEffect(
        "num_generations_eval eval_temperature pass_reward", lambda v: not v.holds_out(), NO_ROW
    ),
    warns(
        "reward_workers",
        lambda v: v["reward_workers"] > max(len(v["reward_funcs"]), 1),
        "more processes than reward functions; lower it",
    ),
    needs("num_completions_to_print", "log_completions"),
)
_ONE_UPDATE = (
    "a rollout is one step, so the ratio is 1; give num_iterations or steps_per_generation"
)
GRPO = (
    needs("kl_estimator kl_in_reward use_bias_correction_kl sync_ref_model", "beta", warn=True),
    warns(
        "use_bias_correction_kl",
        lambda v: v["kl_in_reward"],
        "kl_in_reward subtracts the penalty from the reward",
    ),
    needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model"),
    warns(
        "delta",
        lambda v: v["loss_type"].startswith("cispo"),
        "loss_type {loss_type} does not use it",
    ),
    warns(
        "epsilon",
        lambda v: v["loss_type"] == "cispo_absolute",
        "loss_type cispo_absolute bounds by epsilon_high alone",
    ),
    warns(
        "delta",
        lambda v: v["delta"] is not None and v["delta"] <= _upper_bound(v),
        "epsilon_high, or else epsilon, bounds the ratio by less; raise delta",
    ),
    warns(
        "epsilon epsilon_high delta",
        # The bound of cispo_absolute may be below 1.
        lambda v: _on_policy(v) and v["loss_type"] != "cispo_absolute",
        _ONE_UPDATE,
    ),
    warns(
        "importance_sampling_level",
        lambda v: _on_policy(v) and v["loss_type"].startswith("cispo"),
        _ONE_UPDATE,
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


@dataclass(slots=True, kw_only=True)
class GRPOConfig(RLConfig):
    """GRPO: reward functions score groups of completions of a prompt."""

    algorithm: ClassVar[str] = "grpo"
    demo: ClassVar[dict[str, Any]] = RLConfig.demo | {
        "learning_rate": 2e-4,
        "warmup_steps": 30.0,
        "per_device_train_batch_size": 512,
        "max_steps": 700,
        "logging_steps": 10.0,
        "eval_steps": 100.0,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_rollout, generation_problems, _grpo)
    no_effect: ClassVar[tuple[NoEffect, ...]] = RLConfig.no_effect + GRPO

    output: OutputConfig = section(OutputConfig, output_dir="outputs/grpo")
    rollout: RolloutConfig = section(RolloutConfig)
    grpo: GRPOSection = section(GRPOSection)
