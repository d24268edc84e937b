"""A reward model as a job."""

import jax

from relax.engine import model_source
from relax.engine.recipes.pairs import PairsRecipe, with_wrong_sums
from relax.models.heads import init_head, trunk, with_head
from relax.models.huggingface.classifiers import load_classifier, padded, save_classifier
from relax.models.huggingface.directories import find_directory
from relax.models.huggingface.pretrained import is_classifier
from relax.trainers import RewardTrainer

# By how much wrong sums are off. A policy errs in every way, and finds what was never called wrong.
OFFS = (*range(1, 21), *range(30, 101, 10))


class RewardRecipe(PairsRecipe):
    """Pairs of answers, a fresh or pretrained head, and a sequence classifier in the end."""

    headline = ("eval_loss", "eval_accuracy", "eval_margin")
    reading = {"judges": True}
    share = 0.95  # who judges by a single digit must know it

    def embedded_rows(self, rows):
        return with_wrong_sums(rows, OFFS, each=3)

    def make_model(self, *, weights: bool):
        model, params = model_source.make_model(self.config, weights=weights, load=self._load)
        return trunk(model), params

    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> RewardTrainer:
        h = self.config.hyperparams
        return RewardTrainer(
            model,
            optimizer,
            freeze=self.config.peft.freeze,
            center_rewards_coefficient=self.config.reward_model.center_rewards_coefficient,
            gradient_accumulation_steps=h.gradient_accumulation_steps,
            max_grad_norm=h.max_grad_norm,
            callbacks=callbacks,
        )

    def fresh_params(self, model, tokenizer):
        return self._with_fresh_head(super().fresh_params(model, tokenizer), model)

    def save(self, path, model, params, tokenizer, generation_config):
        pad, own = padded(tokenizer).pad_token, tokenizer.pad_token
        if pad is None:
            self.console.print("no token to pad with: transformers will score one text at a time")
        elif pad != own:
            self.console.print(
                f"saved with {pad} for padding in place of {own}: at an end token transformers "
                "would not read the score",
                markup=False,
            )
        return save_classifier(path, model, params, tokenizer)

    def _load(self, path: str, dtype, **options):
        directory = find_directory(path)
        if (directory / "config.json").is_file() and is_classifier(directory):
            return load_classifier(directory, dtype, **options)
        model, params = model_source.load_model(path, dtype, **options)
        self.console.print(
            f"the head is fresh: '{path}' is a language model, which has none", markup=False
        )
        return model, self._with_fresh_head(params, model)

    def _with_fresh_head(self, params, model):
        key = jax.random.key(self.config.hyperparams.seed)
        return with_head(params, init_head(key, model.config, dtype=model.param_dtype))
