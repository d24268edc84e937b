"""Recipes, one per algorithm: functions from a configuration to a finished run."""

from collections.abc import Callable

from relax.engine.recipes.distill import train_distill
from relax.engine.recipes.dpo import train_dpo
from relax.engine.recipes.grpo import train_grpo
from relax.engine.recipes.online_dpo import train_online_dpo
from relax.engine.recipes.ppo import train_ppo
from relax.engine.recipes.reward import train_reward
from relax.engine.recipes.sft import train_sft
from relax.engine.run import RunResult

RECIPES: dict[str, Callable[..., RunResult]] = {
    "sft": train_sft,
    "dpo": train_dpo,
    "reward": train_reward,
    "grpo": train_grpo,
    "ppo": train_ppo,
    "distill": train_distill,
    "online_dpo": train_online_dpo,
}

__all__ = [
    "RECIPES",
    "train_distill",
    "train_dpo",
    "train_grpo",
    "train_online_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]
