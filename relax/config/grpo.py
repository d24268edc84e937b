"""The configuration of GRPO and related algorithms."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.dpo import ReferenceSection
from relax.config.options import option, section
from relax.config.rl import (
    CompletionsConfig,
    RLConfig,
    broken_age,
    broken_groups,
    generation_problems,
    one_update,
)
from relax.config.rules import NoEffect, Rule, Values, needs, unknown_choice, warns
from relax.config.schema import CachedRowsConfig, OutputConfig

# The names in `relax.losses.LOSS_TYPES` and `ADVANTAGES`, the options that each loss reads, and the
# ratio that some are defined with; this module imports no jax. A test compares them.
LOSSES = (
    "dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "cispo_absolute", "sapo", "vespo", "gmpo",
    "dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov",
)  # fmt: skip
ADVANTAGES = (
    "group", "batch", "none", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
    "maxrl", "gpg", "pass@2", "pass@4", "pass@8", "pass@16",
)  # fmt: skip
_CLIPPED = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")
READERS = {
    "epsilon": (*_CLIPPED, "cispo", "gmpo", "dppo_tv", "dppo_kl", "clip_cov"),
    "epsilon_high": (
        *_CLIPPED,
        "cispo",
        "cispo_absolute",
        "gmpo",
        "dppo_tv",
        "dppo_kl",
        "clip_cov",
    ),
    "delta": _CLIPPED,
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "clip_cov_ratio": ("clip_cov",),
    "clip_cov_lb": ("clip_cov",),
    "clip_cov_ub": ("clip_cov",),
    "kl_cov_ratio": ("kl_cov",),
    "kl_cov_coef": ("kl_cov",),
}
LEVELS = {"luspo": "sequence", "vespo": "trajectory"} | dict.fromkeys(
    ("gmpo", "dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov"), "token"
)


@dataclass(slots=True, kw_only=True)
class RolloutConfig(CompletionsConfig):
    """Sampling of completions, and their reuse in training."""

    steps_per_generation: int | None = option(
        None, "Micro-batches per rollout; none = gradient_accumulation_steps.", at_least=1
    )
    num_iterations: int = option(1, "Passes over the completions of a rollout.", at_least=1)
    agent: str | None = option(
        None,
        "Function that solves a row with the policy behind OpenAI's API: package.module:function "
        "or path/to/file.py:function; see docs/serving.md.",
    )
    agent_timeout_s: float = option(600.0, "Time limit of one call of the agent.", above=0)
    agent_max_length: int | None = option(
        None,
        "Maximum tokens of a prompt and its completion in a call by the agent; none = the model's.",
        at_least=2,
    )


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
    loss_type: str = option(
        "dapo",
        f"Objective and its aggregation over tokens: {', '.join(LOSSES)}, or your own, "
        "path/to/file.py:function; see docs/grpo.md.",
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
    scale_rewards: str = option(
        "group",
        f"Advantages: {', '.join(ADVANTAGES)}, or your own, path/to/file.py:function; see "
        "docs/grpo.md.",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize",
        "Whether rewards of several functions are summed before or after normalisation (GDPO).",
    )
    mask_truncated_completions: bool = option(
        False, "Exclude completions that reached max_completion_length from the loss."
    )
    off_policy_mask_threshold: float | None = option(
        None,
        "Exclude completions of negative advantage whose mean logprob has fallen by more than this "
        "since they were sampled, in nats per token; none = never.",
        above=0,
    )
    top_entropy_quantile: float = option(
        1.0, "Fraction of tokens, those of highest entropy, that are trained.", above=0, at_most=1
    )
    entropy_coef: float = option(0.0, "Entropy bonus coefficient.", at_least=0)
    use_adaptive_entropy: bool = option(
        False, "Adapt the entropy coefficient, from entropy_coef, to hold the entropy up."
    )
    entropy_target: float = option(
        0.2, "Mean entropy per token, in nats, below which the bonus is applied.", above=0
    )
    entropy_coef_delta: float = option(0.005, "Change of the coefficient per step.", above=0)
    entropy_coef_min: float = option(0.0, "Lowest adapted entropy coefficient.", at_least=0)
    entropy_coef_max: float = option(1.0, "Highest adapted entropy coefficient.", above=0)
    cast_lm_head_to_fp32: bool = option(
        False, "Compute the logits from float32 hidden states and weights, also in rollouts."
    )
    sapo_temperature_pos: float = option(
        1.0, "Temperature of sapo where the advantage is positive.", above=0
    )
    sapo_temperature_neg: float = option(1.05, "The same where it is not.", above=0)
    vespo_k_pos: float = option(
        2.0, "Exponent k of vespo where the advantage is not negative.", at_least=0
    )
    vespo_lambda_pos: float = option(3.0, "Decay rate lambda of vespo there.", at_least=0)
    vespo_k_neg: float = option(3.0, "Exponent k of vespo where it is negative.", at_least=0)
    vespo_lambda_neg: float = option(2.0, "Decay rate lambda of vespo there.", at_least=0)
    clip_cov_ratio: float = option(
        2e-4, "Fraction of tokens that clip_cov drops at most.", above=0, at_most=1
    )
    clip_cov_lb: float = option(1.0, "Lowest covariance of a token that clip_cov may drop.")
    clip_cov_ub: float = option(5.0, "Highest covariance of a token that clip_cov may drop.")
    kl_cov_ratio: float = option(
        2e-4,
        "Fraction of tokens, those of highest covariance, with kl_cov's penalty.",
        above=0,
        at_most=1,
    )
    kl_cov_coef: float = option(1.0, "Coefficient of kl_cov's penalty.", at_least=0)
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
        yield from broken_age(v, steps // max(accumulation, 1) * v["num_iterations"])


def _grpo(v: Values) -> Iterator[str]:
    if v["num_generations"] < 2:
        yield (
            "num_generations must be at least 2, since advantages compare the completions of a "
            f"prompt, got {v['num_generations']}"
        )
    yield from unknown_choice("loss_type", v["loss_type"], LOSSES)
    yield from unknown_choice("scale_rewards", v["scale_rewards"], ADVANTAGES)
    if v["scale_rewards"].startswith("pass@") and v["scale_rewards"] in ADVANTAGES:
        k = int(v["scale_rewards"].removeprefix("pass@"))
        if v["num_generations"] < k:
            yield (
                f"scale_rewards {v['scale_rewards']} compares groups of {k} completions, and "
                f"num_generations is {v['num_generations']}; raise it, well above {k}"
            )
    if v["clip_cov_lb"] >= v["clip_cov_ub"]:
        yield (
            f"clip_cov_lb must be below clip_cov_ub, got {v['clip_cov_lb']:g} and "
            f"{v['clip_cov_ub']:g}"
        )
    if v["entropy_coef_min"] > v["entropy_coef_max"]:
        yield (
            "entropy_coef_min must be at most entropy_coef_max, got "
            f"{v['entropy_coef_min']:g} and {v['entropy_coef_max']:g}"
        )
    if v["loss_type"] == "gmpo" and v["top_entropy_quantile"] < 1:
        yield "top_entropy_quantile excludes loss_type gmpo, whose tokens share one ratio"
    if v["multi_objective_aggregation"] == "normalize_then_sum" and v["kl_in_reward"]:
        yield "kl_in_reward excludes multi_objective_aggregation normalize_then_sum"
    if v["beta"] and v["sync_ref_model"] and (v["use_peft"] or v["freeze"]):
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"


def _agent(v: Values) -> Iterator[str]:
    if v["agent"] is None:
        return
    for name in ("environment_factory", "tools"):
        if v[name]:
            yield f"agent excludes {name}: an agent makes its own turns"
    if v["async_rollouts"]:
        yield "agent excludes async_rollouts: its endpoint serves one policy at a time"
    for name in ("top_k", "min_p", "repetition_penalty"):
        if v.given(name):
            yield f"agent excludes {name}: calls are sampled with temperature and top_p alone"
    length = v["agent_max_length"]
    if length is not None and length <= v["max_completion_length"]:
        yield (
            f"agent_max_length {length} leaves no room for a prompt beside max_completion_length "
            f"{v['max_completion_length']}"
        )


def _on_policy(v: Values) -> bool:
    accumulation = max(v["gradient_accumulation_steps"], 1)
    steps = v["steps_per_generation"] or accumulation
    return one_update(v, steps // accumulation * v["num_iterations"])


def _upper_bound(v: Values) -> float:
    """Upper clipping bound of the ratio, without delta."""
    return 1 + (v["epsilon"] if v["epsilon_high"] is None else v["epsilon_high"])


def _only(name: str, readers: tuple[str, ...]) -> NoEffect:
    others = set(LOSSES) - set(readers)  # a loss of the user's own may read any
    return warns(
        name,
        lambda v: v["loss_type"] in others,
        f"loss_type {{loss_type}} does not use it, only {', '.join(readers)}",
    )


_ONE_UPDATE = (
    "a rollout is one step, so the ratio is 1; give num_iterations or steps_per_generation"
)
GRPO = (
    needs("agent_timeout_s agent_max_length", "agent"),
    needs("kl_estimator kl_in_reward use_bias_correction_kl sync_ref_model", "beta", warn=True),
    warns(
        "use_bias_correction_kl",
        lambda v: v["kl_in_reward"],
        "kl_in_reward subtracts the penalty from the reward",
    ),
    needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model"),
    *(_only(name, readers) for name, readers in READERS.items()),
    warns(
        "importance_sampling_level",
        lambda v: (
            LEVELS.get(v["loss_type"], v["importance_sampling_level"])
            != v["importance_sampling_level"]
        ),
        "loss_type {loss_type} is defined with its own",
    ),
    needs(
        "entropy_coef_delta entropy_coef_min entropy_coef_max entropy_target",
        "use_adaptive_entropy",
    ),
    warns(
        "scale_rewards",
        lambda v: v["multi_objective_aggregation"] == "normalize_then_sum",
        "multi_objective_aggregation normalize_then_sum has its own",
    ),
    warns(
        "delta",
        lambda v: v["delta"] is not None and v["delta"] <= _upper_bound(v),
        "epsilon_high, or else epsilon, bounds the ratio by less; raise delta",
    ),
    warns(
        "epsilon epsilon_high delta",
        # The bound of cispo_absolute may be below 1.
        lambda v: _on_policy(v) and v["loss_type"] in READERS["delta"],
        _ONE_UPDATE,
    ),
    warns(
        "importance_sampling_level",
        lambda v: _on_policy(v) and v["loss_type"].startswith("cispo"),
        _ONE_UPDATE,
    ),
    warns(
        "off_policy_mask_threshold",
        lambda v: _on_policy(v) and not v["async_rollouts"],
        _ONE_UPDATE,
    ),
    warns(
        "cast_lm_head_to_fp32",
        lambda v: v["dtype"] == "float32" and v["rollout_dtype"] in (None, "float32"),
        "the computation is in float32 already",
    ),
)


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
    rules: ClassVar[tuple[Rule, ...]] = (_rollout, generation_problems, _grpo, _agent)
    no_effect: ClassVar[tuple[NoEffect, ...]] = RLConfig.no_effect + GRPO

    data: CachedRowsConfig = section(CachedRowsConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/grpo")
    rollout: RolloutConfig = section(RolloutConfig)
    grpo: GRPOSection = section(GRPOSection)
