"""The configuration of reward models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from relax.config.dpo import PreferenceConfig, batch_problems
from relax.config.options import option, options, section
from relax.config.rules import Given, given_by
from relax.config.schema import (
    Hyperparams,
    InferenceConfig,
    OutputConfig,
    PeftConfig,
    TrainerConfig,
)


@dataclass(slots=True, kw_only=True)
class RewardModelSection:
    """Reward models."""

    center_rewards_coefficient: float | None = option(
        None, "Of the squared sum of a pair's scores, 0.01 say; none = off.", above=0
    )


@dataclass(slots=True, kw_only=True)
class RewardModelConfig(TrainerConfig):
    """A reward model: it scores the chosen answer to a prompt above the rejected one."""

    algorithm: ClassVar[str] = "reward"
    # What the run with no flags needs to tell right sums from wrong ones in a minute.
    embedded: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 64,
        "pad_to_multiple_of": 4,
        "max_steps": 800,
        "logging_steps": 20.0,
        "eval_strategy": "steps",
        "eval_steps": 200.0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 250,
    }

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-4)
    # As in TRL there is no dropout; and adapters are saved merged, beside the head.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0, merge_lora=True)
    data: PreferenceConfig = section(PreferenceConfig)
    inference: InferenceConfig = section(InferenceConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/reward")
    reward_model: RewardModelSection = section(RewardModelSection)

    def problems(self) -> list[str]:
        # With slots, super() does not find the class.
        found = TrainerConfig.problems(self)
        if found:
            return found
        known, values = options(type(self)), self.flat()
        given = given_by(known, values, self.embedded)
        return [*_adapters(values, given), *batch_problems(values, given)]


def _adapters(values: dict[str, Any], given: Given) -> Iterator[str]:
    if given("merge_lora"):
        yield "merge_lora must be true: a reward model is saved whole, its head was trained as well"
