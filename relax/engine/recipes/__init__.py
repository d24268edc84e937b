"""Jobs by algorithm: what the engine asks of each."""

from rich.console import Console

from relax.config import TrainerConfig
from relax.engine.recipes.dpo import DPORecipe
from relax.engine.recipes.grpo import GRPORecipe
from relax.engine.recipes.ppo import PPORecipe
from relax.engine.recipes.recipe import Datasets, Recipe
from relax.engine.recipes.reward import RewardRecipe
from relax.engine.recipes.sft import SFTRecipe

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
