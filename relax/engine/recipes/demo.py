"""The embedded model, half taught: what the other algorithms begin with where no model is named."""

import dataclasses

import jax
from rich.console import Console

from relax import data
from relax.callbacks.progress import working
from relax.config import SFTConfig
from relax.engine.recipes.sft import SFTRecipe
from relax.optimizers.optimizers import adamw, learning_rate_schedule
from relax.trainers import SFTTrainer

SHARE = 0.5  # of sums that are right when the warm-up of a policy ends
CHUNK, MOST = 10, 800  # updates between two looks, and at most
LOOKED_AT = 500  # training rows


def pretrain_demo(
    model, tokenizer, seed: int, console: Console, most: int = MOST, share: float = SHARE
):
    """Parameters after supervised updates on the embedded task, up to a share of right sums.

    Half is where rewards can begin to teach: a model that is always wrong has nothing to compare.
    """
    with working(console, "fine-tuning the demo model") as tell:
        config = SFTConfig().replace(**SFTConfig.embedded, seed=seed)
        recipe = SFTRecipe(config, console)
        datasets = recipe.datasets(tokenizer, model.config, (data.arithmetic_rows("train"), None))
        looked_at = dataclasses.replace(
            datasets,
            eval=recipe.datasets(
                tokenizer, model.config, (data.arithmetic_rows("train")[:LOOKED_AT], None)
            ).train,
        )
        schedule = learning_rate_schedule("constant_with_warmup", 1e-3, MOST, 50)
        optimizer = adamw(schedule, b2=0.95, weight_decay=0.1)
        trainer = SFTTrainer(model.clone(lora=None), optimizer, max_grad_norm=1.0)
        state, right, steps = trainer.create_train_state(jax.random.key(seed)), 0.0, 0
        while right < share and steps < most:
            steps += CHUNK
            state = trainer.train(datasets.train, num_epochs=100, state=state, max_steps=steps)
            right = trainer.exact_match(state, recipe.plain_loader(looked_at.eval.examples))
            tell(f"{right:.0%} of sums right, until {share:.0%}; {steps} updates")
    console.print(f"warmed up: {steps} supervised updates, {right:.0%} of the sums are right")
    return state.params
