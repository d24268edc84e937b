"""The configuration of reward models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from relax.config.dpo import PreferenceConfig, pairs_problems
from relax.config.options import option, section
from relax.config.rules import Rule, Values
from relax.config.schema import Hyperparams, OutputConfig, PeftConfig, TrainerConfig


@dataclass(slots=True, kw_only=True)
class RewardModelSection:
    """Loss of the reward model."""

    center_rewards_coefficient: float | None = option(
        None, "Coefficient of the squared sum of both scores, such as 0.01; none = off.", above=0
    )


def _adapters(v: Values) -> Iterator[str]:
    if v.given("merge_lora"):
        yield "merge_lora must be true: a reward model is saved whole, with its head"
    if v["eval_tasks"]:
        yield (
            "eval_tasks are for models that write, and a reward model scores; got "
            f"{','.join(v['eval_tasks'])}"
        )


@dataclass(slots=True, kw_only=True)
class RewardModelConfig(TrainerConfig):
    """Reward model: scores chosen above rejected completions."""

    algorithm: ClassVar[str] = "reward"
    examples: ClassVar[tuple[str, ...]] = (
        "--model_name_or_path DIR --dataset_name pairs.jsonl --output_dir outputs/mine",
    )
    # Defaults of the run without flags, which learns to prefer right sums in a minute.
    demo: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 64,
        "max_steps": 800,
        "logging_steps": 20.0,
        "eval_strategy": "steps",
        "eval_steps": 200.0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 250,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_adapters, pairs_problems)

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-4)
    # No dropout, as in TRL; adapters are saved merged, with the head.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0, merge_lora=True)
    data: PreferenceConfig = section(PreferenceConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/reward")
    reward_model: RewardModelSection = section(RewardModelSection)
