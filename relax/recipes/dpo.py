"""DPO as a job."""

import dataclasses

import numpy as np

from relax.assemble import data_seed, source_rows
from relax.callbacks.reference import ReferenceLogprobs
from relax.config.dpo import KTO
from relax.data import PreferenceLoader, Preferences, prepare_preferences
from relax.errors import DataError
from relax.models import TransformerConfig
from relax.models.trainable import merge
from relax.recipes.recipe import Datasets, Recipe
from relax.recipes.warm_up import warm_up
from relax.trainers import DPOTrainer
from relax.trainers.interrupt import Interrupt, Interrupted

TRAINING, EVALUATION = "training pairs", "evaluation pairs"


class DPORecipe(Recipe):
    """Pairs of answers; on the embedded task right sums over wrong ones."""

    headline = (
        "eval_loss",
        "eval_rewards/accuracies",
        "pair_accuracy_before",
        "pair_accuracy",
        "chosen_logprob_before",
        "chosen_logprob",
    )

    def __init__(self, config, console):
        super().__init__(config, console)
        self._loaders: dict[str, PreferenceLoader] = {}

    @property
    def has_constant_reference(self) -> bool:
        d, named = self.config.dpo, self.config.model.model_name_or_path is not None
        return named and not d.sync_ref_model and not d.precompute_ref_log_probs

    def datasets(self, tokenizer, shape: TransformerConfig, rows=None) -> Datasets:
        d, reports, digest = self.config.data, {}, ""
        for name, part in zip((TRAINING, EVALUATION), source_rows(self.config, rows), strict=True):
            if part is None:
                continue
            preferences, reports[name] = prepare_preferences(
                with_wrong_sums(part) if self.embedded else part,
                tokenizer,
                unpaired=self.config.dpo.loss_type == [KTO],
                system_prompt=self.config.profile.system_prompt,
                eos_token=d.eos_token,
                max_length=d.max_length,
                truncation_mode=d.truncation_mode,
                vocab_size=shape.vocab_size,
            )
            loader = self._loader(preferences, training=name == TRAINING)
            if loader.longest_row > shape.max_position_embeddings:
                raise DataError(
                    f"{name}: rows are up to {loader.longest_row} tokens long, and the model has "
                    f"{shape.max_position_embeddings} positions. "
                    f"Pass --max_length {shape.max_position_embeddings}."
                )
            self._loaders[name] = loader
            digest += f"{preferences.digest:08x}"
        return Datasets(self._loaders[TRAINING], self._loaders.get(EVALUATION), reports, digest)

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

    def show_data(self, datasets: Datasets) -> None:
        for name, report in datasets.reports.items():
            self.console.rule(name, align="left", style="dim")
            for line in report.lines():
                self.console.print(line, markup=False)
            loader = self._loaders[name]
            if loader.packed_length is not None:
                self.console.print(
                    f"packing      {len(loader.rows):,} rows of {loader.packed_length:,} tokens, "
                    f"{loader.fill:.1%} full"
                )
            if name == TRAINING and self.config.debug.print_examples:
                prompt, first, second = report.example
                self.console.print(f"{prompt}«{first}»«{second}»", markup=False)

    def callbacks(self, run_dir, logging_steps: int) -> tuple:
        if not self.config.dpo.precompute_ref_log_probs:
            return ()
        directory = self.config.dpo.ref_log_probs_dir or run_dir / "reference"
        return (ReferenceLogprobs(self._loaders, directory, self.console),)

    def fresh_params(self, model, tokenizer):
        with Interrupt() as interrupt:
            params = warm_up(model, tokenizer, self.config.hyperparams.seed, self.console)
            if interrupt.requested is not None:  # half a warm-up is nothing to go on from
                raise Interrupted(interrupt.requested)
        return params

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

    def _loader(self, preferences: Preferences, *, training: bool) -> PreferenceLoader:
        h, d = self.config.hyperparams, self.config.data
        rows = self.config.inference.per_device_eval_batch_size
        if training:
            rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
        return PreferenceLoader(
            preferences,
            rows,
            seed=data_seed(self.config),
            shuffle=training and d.shuffle_dataset,
            packed_length=2 * d.max_length if d.pack_pairs else None,
            pad_to_multiple_of=d.pad_to_multiple_of or 8,
        )


def with_wrong_sums(rows: list[dict]) -> list[dict]:
    """The embedded rows as pairs: the sum is chosen, one that is off by 1 or by 10 is not.

    >>> from relax.data import arithmetic_rows
    >>> pair = with_wrong_sums(arithmetic_rows("test"))[0]
    >>> [m["content"] for name in ("prompt", "chosen", "rejected") for m in pair[name]]
    ['53+1=', '54', '44']
    """
    # The raw stream of a bit generator is the same in every numpy version.
    words = np.random.PCG64(0).random_raw(len(rows)).tolist()
    pairs = []
    for row, word in zip(rows, words, strict=True):
        right, off = int(row["completion"][0]["content"]), (1, 10)[word % 2]
        wrong = right - off if word // 2 % 2 and right >= off else right + off
        rejected = [{"role": "assistant", "content": str(wrong)}]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return pairs
