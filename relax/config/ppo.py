"""The configuration of PPO."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, section
from relax.config.rl import (
    CompletionsConfig,
    RLConfig,
    broken_age,
    broken_groups,
    generation_problems,
    one_update,
)
from relax.config.rules import NoEffect, Rule, Values, needs, warns
from relax.config.schema import CachedRowsConfig, OutputConfig


@dataclass(slots=True, kw_only=True)
class PPOSection:
    """Objective, critic and KL penalty of PPO."""

    num_ppo_epochs: int = option(4, "Passes over the completions of a rollout.", at_least=1)
    num_mini_batches: int = option(1, "Mini-batches (steps) per pass.", at_least=1)
    value_model: str | None = option(
        None,
        "Critic: none = a value head on the policy; policy = a copy of the policy with a value "
        "head; or the directory of a model or reward model.",
    )
    critic_learning_rate: float | None = option(
        None, "Learning rate of the critic; none = learning_rate.", above=0
    )
    critic_warmup_steps: int = option(
        0, "Steps at the start that train the critic only.", at_least=0
    )
    vf_coef: float = option(0.1, "Value loss coefficient.", above=0)
    cliprange_value: float | None = option(
        0.2, "Clipping range of values around those of the rollout; none = off.", above=0
    )
    kl_coef: float = option(
        0.05, "KL coefficient in the reward; 0 disables the reference model.", at_least=0
    )
    kl_estimator: Literal["k1", "k3"] = option("k1", "Estimator of the KL divergence per token.")
    kl_target: float | None = option(
        None, "Target KL per completion, nats, for adaptive kl_coef; none = constant.", above=0
    )
    kl_horizon: float = option(
        10000.0, "Completions over which an adaptive kl_coef changes by at most a fifth.", above=0
    )
    reward_at: Literal["last_token", "after_eos"] = option(
        "last_token", "Token that receives the reward; after_eos is TRL's placement."
    )
    missing_eos_penalty: float | None = option(
        None, "Subtracted from the reward of completions without an EOS token.", above=0
    )
    whiten_rewards: bool = option(False, "Scale the rewards of a rollout to variance 1.")
    gamma: float = option(1.0, "Discount factor.", at_least=0, at_most=1)
    lam: float = option(
        0.95, "Lambda of generalised advantage estimation (GAE).", at_least=0, at_most=1
    )
    cliprange: float = option(
        0.2, "Clipping range of the ratio: 1 - cliprange to 1 + cliprange.", above=0
    )
    dual_clip: float | None = option(
        None, "Upper bound of the ratio for negative advantages, such as 3; none = off.", above=1
    )
    entropy_coef: float = option(0.0, "Entropy bonus coefficient.", at_least=0)
    target_kl: float | None = option(
        None, "KL to the rollout that skips its remaining steps; none = off.", above=0
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _sizes(v: Values) -> Iterator[str]:
    yield from broken_groups(v, v["gradient_accumulation_steps"] * v["num_mini_batches"])
    yield from broken_age(v, v["num_ppo_epochs"] * v["num_mini_batches"])


def _critic(v: Values) -> Iterator[str]:
    warmup, steps = v["critic_warmup_steps"], v["max_steps"]
    if 0 < steps <= warmup:
        yield (
            f"critic_warmup_steps must leave steps for the policy, got {warmup} of {steps} "
            "steps; lower it"
        )
    if v["target_kl"] is not None and v["offload_optimizer"]:
        yield (
            "target_kl undoes an update, for which offload_optimizer keeps no old state; remove one"
        )
    if v["value_model"] == "policy" and v["quantize_base"]:
        yield (
            "value_model policy trains all weights of a copy, which quantize_base rounds: give the "
            "critic's directory, or no value_model for a head on the policy's trunk"
        )


PPO = (
    needs("kl_estimator kl_target", "kl_coef", warn=True),
    needs("kl_horizon", "kl_target"),
    warns(
        "dual_clip",
        lambda v: v["dual_clip"] is not None and v["dual_clip"] <= 1 + v["cliprange"],
        "cliprange {cliprange} bounds the ratio by less; raise dual_clip",
    ),
    warns(
        "cliprange dual_clip cliprange_value target_kl",
        lambda v: one_update(v, v["num_ppo_epochs"] * v["num_mini_batches"]),
        "a rollout is one step, so nothing has changed; give num_ppo_epochs or num_mini_batches",
    ),
)


@dataclass(slots=True, kw_only=True)
class PPOConfig(RLConfig):
    """PPO: reward functions score completions; a critic is the baseline."""

    algorithm: ClassVar[str] = "ppo"
    script: ClassVar[str] = "run_rl.py"
    demo: ClassVar[dict[str, Any]] = RLConfig.demo | {
        "learning_rate": 3e-4,
        "warmup_steps": 40.0,
        "per_device_train_batch_size": 256,
        "num_generations": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "vf_coef": 0.5,
        "max_steps": 1400,
        "logging_steps": 20.0,
        "eval_steps": 200.0,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_sizes, generation_problems, _critic)
    no_effect: ClassVar[tuple[NoEffect, ...]] = RLConfig.no_effect + PPO

    data: CachedRowsConfig = section(CachedRowsConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/ppo")
    rollout: CompletionsConfig = section(CompletionsConfig, num_generations=1)
    ppo: PPOSection = section(PPOSection)
