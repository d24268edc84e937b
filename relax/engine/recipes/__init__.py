"""Jobs by algorithm: what the engine asks of each."""

from rich.console import Console

from relax.config import TrainerConfig
from relax.recipes.dpo import DPORecipe
from relax.recipes.grpo import GRPORecipe
from relax.recipes.ppo import PPORecipe
from relax.recipes.recipe import Datasets, Recipe
from relax.recipes.reward import RewardRecipe
from relax.recipes.sft import SFTRecipe

RECIPES: dict[str, type[Recipe]] = {
    "sft": SFTRecipe,
    "dpo": DPORecipe,
    "reward": RewardRecipe,
    "grpo": GRPORecipe,
    "ppo": PPORecipe,
}

__all__ = ["RECIPES", "Datasets", "Recipe", "recipe_of"]


def recipe_of(config: TrainerConfig, console: Console) -> Recipe:
    """The recipe of a configuration's algorithm."""
    return RECIPES[config.algorithm](config, console)
