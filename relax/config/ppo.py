"""The configuration of PPO."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, options, section
from relax.config.rl import (
    CompletionsConfig,
    RewardConfig,
    broken_groups,
    evaluation_problems,
    reward_problems,
    sampling_problems,
)
from relax.config.rules import Given, given_by, unused
from relax.config.schema import (
    Hyperparams,
    InferenceConfig,
    OutputConfig,
    PeftConfig,
    TrainerConfig,
)


@dataclass(slots=True, kw_only=True)
class PPOSection:
    """Proximal policy optimisation."""

    num_ppo_epochs: int = option(4, "Passes over the completions of a rollout.", at_least=1)
    num_mini_batches: int = option(1, "Updates of one pass.", at_least=1)
    value_model: str | None = option(
        None,
        "The critic: none = a head on the policy's trunk; policy = a copy of the policy with one; "
        "or the directory of a model or a reward model.",
    )
    critic_learning_rate: float | None = option(
        None, "Of the critic; none = learning_rate.", above=0
    )
    critic_warmup_steps: int = option(0, "The policy stands still for so many updates.", at_least=0)
    vf_coef: float = option(0.1, "Of the value loss.", above=0)
    cliprange_value: float | None = option(
        0.2, "How far a value may go from the rollout's; none = any way.", above=0
    )
    kl_coef: float = option(0.05, "Of the KL penalty in the reward; 0 = no reference.", at_least=0)
    kl_estimator: Literal["k1", "k3"] = option("k1", "Estimate of the KL per token.")
    kl_target: float | None = option(
        None, "Nats of a completion that kl_coef follows; none = kl_coef stays.", above=0
    )
    kl_horizon: float = option(
        10000.0, "Completions in which kl_coef then changes by a fifth at most.", above=0
    )
    reward_at: Literal["last_token", "after_eos"] = option(
        "last_token", "Where the score is given; after_eos is TRL's placement."
    )
    missing_eos_penalty: float | None = option(
        None, "Taken off the score of completions that did not end by themselves.", above=0
    )
    whiten_rewards: bool = option(False, "Give the rewards of a rollout variance 1.")
    gamma: float = option(1.0, "Discount of what comes later.", at_least=0, at_most=1)
    lam: float = option(0.95, "Share of longer looks ahead in advantages.", at_least=0, at_most=1)
    cliprange: float = option(0.2, "The ratio is clipped to 1 - and 1 + cliprange.", above=0)
    dual_clip: float | None = option(
        None, "Bound of the ratio where the advantage is negative, 3 say; none = none.", above=1
    )
    entropy_coef: float = option(0.0, "Of the entropy bonus.", at_least=0)
    target_kl: float | None = option(
        None, "The rest of a rollout is skipped when the policy is this far from it.", above=0
    )
    loss_chunk_size: int = option(256, "Tokens whose logits exist at once.", at_least=1)


@dataclass(slots=True, kw_only=True)
class PPOConfig(TrainerConfig):
    """PPO: completions are judged by reward functions, against what a critic expected."""

    algorithm: ClassVar[str] = "ppo"
    script: ClassVar[str] = "run_rl.py"
    # What the run with no flags needs to learn addition from rewards in a few minutes.
    embedded: ClassVar[dict[str, Any]] = {
        "learning_rate": 3e-4,
        "warmup_steps": 40.0,
        "per_device_train_batch_size": 256,
        "num_generations": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "vf_coef": 0.5,
        "max_steps": 1400,
        "logging_steps": 20.0,
        "max_completion_length": 6,
        "reward_funcs": ["exact_match"],
        "eval_strategy": "steps",
        "eval_steps": 200.0,
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
    output: OutputConfig = section(OutputConfig, output_dir="outputs/ppo")
    rollout: CompletionsConfig = section(CompletionsConfig, num_generations=1)
    reward: RewardConfig = section(RewardConfig)
    ppo: PPOSection = section(PPOSection)

    def problems(self) -> list[str]:
        # With slots, super() does not find the class.
        found = TrainerConfig.problems(self)
        if found:
            return found
        known, values = options(type(self)), self.flat()
        given = given_by(known, values, self.embedded)
        rules = (_sizes, sampling_problems, evaluation_problems, reward_problems)
        rules += (_penalty, _critic, _on_policy)
        return [problem for rule in rules for problem in rule(values, given)]


def _sizes(values: dict[str, Any], given: Given) -> Iterator[str]:
    G, rows = values["num_generations"], values["per_device_train_batch_size"]
    micro_batches = values["gradient_accumulation_steps"] * values["num_mini_batches"]
    if rows * micro_batches % G:
        yield broken_groups(G, rows, micro_batches)


def _penalty(values: dict[str, Any], given: Given) -> Iterator[str]:
    if not values["kl_coef"]:
        for name in ("kl_estimator", "kl_target"):
            if given(name):
                yield unused(name, "kl_coef is 0, so there is no reference")
    if given("kl_horizon") and values["kl_target"] is None:
        yield unused("kl_horizon", "kl_target is none, so kl_coef stays")


def _critic(values: dict[str, Any], given: Given) -> Iterator[str]:
    warmup, steps = values["critic_warmup_steps"], values["max_steps"]
    if 0 < steps <= warmup:
        yield (
            f"critic_warmup_steps must leave updates for the policy, got {warmup} of {steps} "
            "updates; lower it"
        )
    if values["dual_clip"] is not None and values["dual_clip"] <= 1 + values["cliprange"]:
        bound = 1 + values["cliprange"]
        yield unused("dual_clip", f"the ratio is bounded by {bound:g} already; give more")


def _on_policy(values: dict[str, Any], given: Given) -> Iterator[str]:
    """Where a rollout is one update, ratios are 1 and values are those of the rollout."""
    dropout = values["use_peft"] and values["lora_dropout"]
    several = values["num_ppo_epochs"] * values["num_mini_batches"] > 1
    if several or dropout or values["dtype"] != "float32":
        return
    for name in ("cliprange", "dual_clip", "cliprange_value", "target_kl"):
        if given(name):
            yield unused(
                name,
                "a rollout is one update, so nothing has moved; give num_ppo_epochs or "
                "num_mini_batches",
            )
