"""GRPO as a job."""

import dataclasses

from relax.engine.recipes.rl import RLRecipe
from relax.trainers import GRPOTrainer


class GRPORecipe(RLRecipe):
    """Groups of completions against each other."""

    @property
    def extra_rounds(self) -> int:
        return self.config.grpo.max_resample_rounds

    @property
    def updates_per_pass(self) -> int:
        accumulation = self.config.hyperparams.gradient_accumulation_steps
        return (self.config.rollout.steps_per_generation or accumulation) // accumulation

    @property
    def passes(self) -> int:
        return self.config.rollout.num_iterations

    @property
    def reference_is_initial_model(self) -> bool:
        g = self.config.grpo
        named = self.config.model.model_name_or_path is not None
        return g.beta > 0 and named and not g.sync_ref_model

    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> GRPOTrainer:
        return GRPOTrainer(
            model,
            optimizer,
            num_iterations=self.passes,
            callbacks=callbacks,
            **self._shared_options(tokenizer),
            **dataclasses.asdict(self.config.grpo),
        )
