"""DPO as a job."""

import dataclasses

import numpy as np

from relax.callbacks.reference import ReferenceLogprobs
from relax.config.dpo import KTO
from relax.engine.recipes.pairs import PairsRecipe
from relax.engine.recipes.recipe import Datasets
from relax.models.trainable import merge
from relax.trainers import DPOTrainer


class DPORecipe(PairsRecipe):
    """Pairs of answers; on the embedded task right sums over wrong ones."""

    headline = (
        "eval_loss",
        "eval_rewards/accuracies",
        "pair_accuracy_before",
        "pair_accuracy",
        "chosen_logprob_before",
        "chosen_logprob",
    )

    @property
    def reading(self) -> dict:
        return {"unpaired": self.config.dpo.loss_type == [KTO]}

    @property
    def reference_is_initial_model(self) -> bool:
        d, named = self.config.dpo, self.config.model.model_name_or_path is not None
        return named and not d.sync_ref_model and not d.precompute_ref_log_probs

    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> DPOTrainer:
        h, options = self.config.hyperparams, dataclasses.asdict(self.config.dpo)
        options.pop("ref_log_probs_dir")
        return DPOTrainer(
            model,
            optimizer,
            freeze=self.config.peft.freeze,
            precomputed=options.pop("precompute_ref_log_probs"),
            gradient_accumulation_steps=h.gradient_accumulation_steps,
            max_grad_norm=h.max_grad_norm,
            callbacks=callbacks,
            **options,
        )

    def complete(self, item):
        if not self.config.dpo.precompute_ref_log_probs:
            return item
        return item | {"ref_logprobs": np.zeros((*item["index"].shape, 2), np.float32)}

    def callbacks(self, run_dir, logging_steps: int) -> tuple:
        if not self.config.dpo.precompute_ref_log_probs:
            return ()
        directory = self.config.dpo.ref_log_probs_dir or run_dir / "reference"
        return (ReferenceLogprobs(self.loaders, directory, self.console),)

    def examine(self, when: str, trainer, state, datasets: Datasets) -> dict:
        if datasets.eval is None or not trainer.is_paired:
            return {}
        params = merge(state.eval_params, state.frozen)
        rows = []
        for batch in datasets.eval:
            is_real = batch["index"].reshape(-1) >= 0
            rows.append(trainer.answer_logprobs(params, batch)[is_real])
        chosen, rejected = np.concatenate(rows).T
        right, logprob = float((chosen > rejected).mean()), float(chosen.mean())
        self.console.print(
            f"held-out pairs {when} training: the right sum is likelier in {right:.1%}; mean "
            f"log-probability of right sums {logprob:.2f}, of wrong ones {rejected.mean():.2f}"
        )
        suffix = "_before" if when == "before" else ""
        return {f"pair_accuracy{suffix}": right, f"chosen_logprob{suffix}": logprob}
