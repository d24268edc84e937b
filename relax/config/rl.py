"""The configurations of reinforcement learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, options, section
from relax.config.rules import Given, given_by, unused
from relax.config.schema import (
    Hyperparams,
    InferenceConfig,
    OutputConfig,
    PeftConfig,
    TrainerConfig,
)


@dataclass(slots=True, kw_only=True)
class CompletionsConfig:
    """How completions are drawn, and how many of a prompt."""

    num_generations: int = option(8, "Completions per prompt.", at_least=1)
    max_completion_length: int = option(512, "Tokens of a completion at most.", at_least=1)
    temperature: float = option(1.0, "Divides the logits, in sampling and in the loss.", above=0)
    top_k: int = option(0, "Draw from so many most likely tokens; 0 = off.", at_least=0)
    top_p: float = option(1.0, "Draw from the likeliest that hold this share.", above=0, at_most=1)
    min_p: float = option(
        0.0, "Draw from tokens this share as likely as the likeliest.", at_least=0, at_most=1
    )
    repetition_penalty: float = option(1.0, "Divides the logits of tokens seen; 1 = off.", above=0)
    recompute_old_logprobs: bool = option(
        False, "By a forward pass, not the sampler's; so it is where top_k and kin are on."
    )
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; none = as num_generations.", at_least=1
    )
    eval_temperature: float | None = option(
        None, "Of evaluation; 0 = greedy; none = as temperature.", at_least=0
    )
    rollout_slots: int = option(64, "Completions that are decoded at a time.", at_least=1)


@dataclass(slots=True, kw_only=True)
class RolloutConfig(CompletionsConfig):
    """How completions are drawn, and how often they are trained on."""

    steps_per_generation: int | None = option(
        None,
        "Micro-batches per rollout; none = gradient_accumulation_steps.",
        at_least=1,
    )
    num_iterations: int = option(1, "Passes over the completions of a rollout.", at_least=1)


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """What judges completions."""

    reward_funcs: list[str] = option(
        [], "Shipped names, package.module.function, path/to/file.py:function, model:DIR."
    )
    environment: str | None = option(
        None, "What the model talks to: calculator, package.module.Class or path/to/file.py:Class."
    )
    reward_weights: list[float] | None = option(None, "One per function; none = all 1.")
    reward_kwargs: dict = option({}, 'Parameters by function: {"name": {"parameter": value}}.')
    reward_timeout_s: float = option(30.0, "Seconds that one function may take.", above=0)
    reward_workers: int = option(1, "Processes that functions are dealt out to.", at_least=1)
    max_reward_errors: float = option(
        0.1, "Share of completions that a function may fail on.", at_least=0, at_most=1
    )
    pass_reward: float = option(1.0, "From this reward on a completion passes, for pass@k.")
    log_completions: bool = option(False, "Show a table of completions every logging_steps.")
    num_completions_to_print: int = option(8, "Rows of that table.", at_least=1)


@dataclass(slots=True, kw_only=True)
class GRPOSection:
    """Group relative policy optimisation."""

    beta: float = option(0.0, "Of the KL penalty; 0 = no reference.", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "Estimate of the KL per token.")
    kl_in_reward: bool = option(False, "Take the penalty off the reward, not onto the loss.")
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "cispo_absolute"] = option(
        "dapo", "Objective and aggregation."
    )
    epsilon: float = option(0.2, "The ratio is clipped below 1 - epsilon.", above=0)
    epsilon_high: float | None = option(
        None, "The ratio is clipped above 1 + epsilon_high; none = as epsilon.", above=0
    )
    delta: float | None = option(None, "Bound of the ratio of bad completions.", above=1)
    importance_sampling_level: Literal["token", "sequence", "trajectory"] = option(
        "token", "Ratio per token, of the sequence's mean (GSPO), or of all of it (RLOO)."
    )
    scale_rewards: Literal["group", "batch", "none", "rloo"] = option(
        "group", "What divides the advantages; rloo: against the mean of the others."
    )
    mask_truncated_completions: bool = option(False, "Do not train on those that did not end.")
    entropy_coef: float = option(0.0, "Of the entropy bonus.", at_least=0)
    max_resample_rounds: int = option(
        0, "Replace groups of equal rewards by fresh prompts' so often (DAPO).", at_least=0
    )
    sync_ref_model: bool = option(False, "Move the reference towards the policy.")
    ref_model_mixup_alpha: float = option(
        0.6, "The policy's share when it moves.", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(512, "Updates between moves.", at_least=1)
    loss_chunk_size: int = option(256, "Tokens whose logits exist at once.", at_least=1)


@dataclass(slots=True, kw_only=True)
class GRPOConfig(TrainerConfig):
    """GRPO: completions of a prompt are judged by reward functions, against each other."""

    algorithm: ClassVar[str] = "grpo"
    # What the run with no flags needs to learn addition from rewards in a few minutes.
    embedded: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-4,
        "warmup_steps": 30.0,
        "per_device_train_batch_size": 512,
        "max_steps": 700,
        "logging_steps": 10.0,
        "max_completion_length": 6,
        "reward_funcs": ["exact_match"],
        "eval_strategy": "steps",
        "eval_steps": 100.0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 500,
        "num_generations_eval": 1,
        "eval_temperature": 0.0,
        "rollout_slots": 512,
    }

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
    # With dropout the ratio would be noise from the first update on: the sampler has none.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0)
    inference: InferenceConfig = section(InferenceConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/grpo")
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    grpo: GRPOSection = section(GRPOSection)

    def problems(self) -> list[str]:
        # With slots, super() does not find the class.
        found = TrainerConfig.problems(self)
        if found:
            return found
        known, values = options(type(self)), self.flat()
        given = given_by(known, values, self.embedded)
        rules = (_rollout, sampling_problems, evaluation_problems, reward_problems)
        rules += (_grpo, _on_policy)
        return [problem for rule in rules for problem in rule(values, given)]


def _rollout(values: dict[str, Any], given: Given) -> Iterator[str]:
    G, rows = values["num_generations"], values["per_device_train_batch_size"]
    accumulation = values["gradient_accumulation_steps"]
    steps = values["steps_per_generation"] or accumulation
    if steps % accumulation:
        yield (
            "steps_per_generation must be a multiple of gradient_accumulation_steps, got "
            f"{steps} and {accumulation}"
        )
    elif rows * steps % G:
        yield broken_groups(G, rows, steps)


def broken_groups(num_generations: int, rows: int, micro_batches: int) -> str:
    """The sentence that refuses a rollout of broken groups, with sizes that would do."""
    below = rows * micro_batches // num_generations * num_generations
    fits = " or ".join(
        str(n // micro_batches)
        for n in (below, below + num_generations)
        if n and n % micro_batches == 0
    ) or str(num_generations)
    return (
        "the completions of a rollout must be whole groups, and num_generations "
        f"{num_generations} does not divide per_device_train_batch_size {rows} x {micro_batches} "
        f"micro-batches; per_device_train_batch_size {fits} would fit"
    )


def sampling_problems(values: dict[str, Any], given: Given) -> Iterator[str]:
    narrowed = [name for name in ("top_k", "top_p", "min_p", "repetition_penalty") if given(name)]
    if given("recompute_old_logprobs") and narrowed:
        yield unused("recompute_old_logprobs", f"{narrowed[0]} has them computed in any case")


def evaluation_problems(values: dict[str, Any], given: Given) -> Iterator[str]:
    asked = values["eval_strategy"] != "no" or values["eval_on_start"]
    held_out = given("eval_dataset_name") or given("test_size") or values["dataset_name"] is None
    if not asked and not held_out:
        for name in ("num_generations_eval", "eval_temperature", "pass_reward"):
            if given(name):
                yield unused(name, "no row is held out; give eval_dataset_name or test_size")
    if values["num_generations_eval"] not in (None, 1) and values["eval_temperature"] == 0:
        yield "eval_temperature 0 draws the same completion again; make num_generations_eval 1"


def reward_problems(values: dict[str, Any], given: Given) -> Iterator[str]:
    functions, weights = values["reward_funcs"], values["reward_weights"]
    if not functions and values["environment"] is None:
        yield "reward_funcs must name what judges completions, got none; see docs/rewards.md"
    if weights is not None and len(weights) != len(functions):
        yield (
            f"reward_weights must be one per reward function, got {len(weights)} for "
            f"{len(functions)}"
        )
    if given("reward_workers") and values["reward_workers"] > max(len(functions), 1):
        yield unused("reward_workers", f"there are {len(functions)} functions to deal out")
    if given("num_completions_to_print") and not values["log_completions"]:
        yield unused("num_completions_to_print", "log_completions is false")


def _grpo(values: dict[str, Any], given: Given) -> Iterator[str]:
    if values["num_generations"] < 2:
        yield (
            "num_generations must be at least 2, since advantages are against the group, got "
            f"{values['num_generations']}"
        )
    if not values["beta"]:
        for name in ("kl_estimator", "kl_in_reward", "sync_ref_model"):
            if given(name):
                yield unused(name, "beta is 0, so there is no reference")
    if values["sync_ref_model"] and (values["use_peft"] or values["freeze"]):
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"
    if not values["sync_ref_model"]:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if given(name):
                yield unused(name, "sync_ref_model is false")
    if values["loss_type"].startswith("cispo") and given("delta"):
        yield unused("delta", f"loss_type {values['loss_type']} has no such bound")
    if values["loss_type"] == "cispo_absolute" and given("epsilon"):
        yield unused("epsilon", "loss_type cispo_absolute bounds by epsilon_high alone")
    high = values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"]
    if values["delta"] is not None and values["delta"] <= 1 + high:
        yield unused("delta", f"the ratio is bounded by {1 + high:g} already; give more")


def _on_policy(values: dict[str, Any], given: Given) -> Iterator[str]:
    """Where a rollout is one update of the policy that drew it, the ratio is 1 all along."""
    accumulation, iterations = values["gradient_accumulation_steps"], values["num_iterations"]
    updates = (values["steps_per_generation"] or accumulation) // accumulation * iterations
    dropout = values["use_peft"] and values["lora_dropout"]
    if updates > 1 or dropout or values["dtype"] != "float32":
        return
    bounds = ["epsilon", "epsilon_high", "delta"]
    if values["loss_type"] == "cispo_absolute":
        bounds = []  # its bound may be below 1
    if values["loss_type"].startswith("cispo"):
        bounds.append("importance_sampling_level")
    for name in bounds:
        if given(name):
            yield unused(
                name,
                "a rollout is one update, so the ratio is 1; give num_iterations or "
                "steps_per_generation",
            )
