"""Supervised fine-tuning as a job."""

import zlib

from relax import data
from relax.engine.model_source import data_seed
from relax.engine.recipes.recipe import Datasets, Recipe
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig
from relax.trainers import SFTTrainer


class SFTRecipe(Recipe):
    """Rows with labelled tokens; on the embedded task the share of sums written without a fault."""

    _has_answers = False  # rows are trained on in part

    @property
    def headline(self) -> tuple[str, ...]:
        matches = ("exact_match_before", "exact_match") if self.embedded else ("eval_exact_match",)
        return ("eval_loss", *matches)

    def datasets(self, tokenizer, shape: TransformerConfig, rows=None) -> Datasets:
        loaders, reports, digest = {}, {}, 0
        found = ErrorList()
        for name, part in self.sources(rows).items():
            with found.catch():
                strategy = self._packing(training=name == self.training)
                options = self._format_options(strategy)
                examples, reports[name] = data.prepare(part, tokenizer, options, shape.vocab_size)
                loaders[name] = self._loader(examples, strategy, training=name == self.training)
                if strategy:
                    reports[name] = reports[name].with_packing(strategy, loaders[name])
                for array in (examples.input_ids, examples.labels, examples.offsets):
                    digest = zlib.crc32(array.tobytes(), digest)
                longest = max(loaders[name].bucket_lengths)
                if longest > shape.max_position_embeddings:
                    raise DataError(
                        f"{name}: batches are up to {longest} tokens long, and the model has "
                        f"{shape.max_position_embeddings} positions. "
                        f"Pass --max_length {shape.max_position_embeddings}."
                    )
        found.raise_all()
        # Of whole texts no two are the same, and looking would cost time.
        self._has_answers = reports[self.training].trained_on != "every token"
        return self.gathered(loaders, reports, f"{digest:08x}")

    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> SFTTrainer:
        h = self.config.hyperparams
        return SFTTrainer(
            model,
            optimizer,
            freeze=self.config.peft.freeze,
            loss_chunk_size=self.config.sft.loss_chunk_size,
            exact_matches=self._has_answers,
            gradient_accumulation_steps=h.gradient_accumulation_steps,
            max_grad_norm=h.max_grad_norm,
            callbacks=callbacks,
        )

    def show_data(self, datasets: Datasets) -> None:
        for name, report in datasets.reports.items():
            examples = self.config.debug.print_examples if name == self.training else 0
            data.render(report, self.console, examples, title=name)

    def examine(self, when: str, trainer, state, datasets: Datasets) -> dict:
        loader = self.plain_loader(datasets.eval.examples)
        share = trainer.exact_match(state, loader)
        self.console.print(f"held-out exact match {when} training: {share:.1%}")
        return {"exact_match_before" if when == "before" else "exact_match": share}

    def plain_loader(self, examples) -> data.DataLoader:
        """Rows to evaluate on, one example each, in the given order."""
        return self._loader(examples, None, training=False)

    def _format_options(self, strategy: str | None) -> data.FormatOptions:
        d, sft = self.config.data, self.config.sft
        # The two strategies that split long rows keep every token: nothing is cut before them.
        splits = strategy not in (None, "bfd")
        return data.FormatOptions(
            text_field=d.dataset_text_field,
            completion_only_loss=sft.completion_only_loss,
            assistant_only_loss=sft.assistant_only_loss,
            system_prompt=self.system_prompt,
            eos_token=d.eos_token,
            max_length=None if splits else d.max_length,
            truncation_mode=d.truncation_mode,
        )

    def _packing(self, *, training: bool) -> str | None:
        d = self.config.data
        packs = d.packing if training or d.eval_packing is None else d.eval_packing
        return d.packing_strategy if packs else None

    def _loader(self, examples, packing: str | None, *, training: bool) -> data.DataLoader:
        h, d = self.config.hyperparams, self.config.data
        rows = self.config.inference.per_device_eval_batch_size
        if training:
            rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
        return data.DataLoader(
            examples,
            rows,
            seed=data_seed(self.config),
            shuffle=training and d.shuffle_dataset,
            packing=packing,
            max_length=d.max_length if packing else None,
            pad_to_multiple_of=d.pad_to_multiple_of or 8,
        )
