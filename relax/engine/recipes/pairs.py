"""Pairs of answers as the data of a job."""

import numpy as np

from relax.data import PreferenceLoader, Preferences, prepare_preferences
from relax.engine.model_source import data_seed
from relax.engine.recipes.demo import CHUNK, MOST, SHARE, pretrain_demo
from relax.engine.recipes.recipe import Datasets, Recipe
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig
from relax.trainers.interrupt import Interrupt, Interrupted


class PairsRecipe(Recipe):
    """Base of the recipes that learn from pairs; on the embedded task right sums over wrong ones.

    Attributes:
      loaders: by the name under which each is shown.
    """

    what, kind = "pairs", "preferences"
    share = SHARE  # of sums that the embedded model is taught beforehand

    def __init__(self, config, console):
        super().__init__(config, console)
        self.loaders: dict[str, PreferenceLoader] = {}

    @property
    def reading(self) -> dict:
        """How rows are read beside what the configuration says, see `prepare_preferences`."""
        return {}

    def datasets(self, tokenizer, shape: TransformerConfig, rows=None) -> Datasets:
        d, reports, digest = self.config.data, {}, ""
        found = ErrorList()
        for name, part in self.sources(rows).items():
            with found.catch():
                preferences, reports[name] = prepare_preferences(
                    part,
                    tokenizer,
                    **self.reading,
                    system_prompt=self.system_prompt,
                    eos_token=d.eos_token,
                    max_length=d.max_length,
                    truncation_mode=d.truncation_mode,
                    vocab_size=shape.vocab_size,
                )
                loader = self._loader(preferences, training=name == self.training)
                if loader.longest_row > shape.max_position_embeddings:
                    raise DataError(
                        f"{name}: rows are up to {loader.longest_row} tokens long, and the model "
                        f"has {shape.max_position_embeddings} positions. "
                        f"Pass --max_length {shape.max_position_embeddings}."
                    )
                self.loaders[name] = loader
                digest += f"{preferences.digest:08x}"
        found.raise_all()
        return self.gathered(self.loaders, reports, digest)

    def embedded_rows(self, rows):
        return with_wrong_sums(rows)

    def show_data(self, datasets: Datasets) -> None:
        for name, report in datasets.reports.items():
            self.console.rule(name, align="left", style="dim")
            for line in report.lines():
                self.console.print(line, markup=False)
            loader = self.loaders[name]
            if loader.packed_length is not None:
                self.console.print(
                    f"packing      {len(loader.rows):,} rows of {loader.packed_length:,} tokens, "
                    f"{loader.fill:.1%} full"
                )
            if name == self.training and self.config.debug.print_examples:
                prompt, first, second = report.example
                self.console.print(f"{prompt}«{first}»«{second}»", markup=False)

    def fresh_params(self, model, tokenizer):
        seed = self.config.hyperparams.seed
        with Interrupt() as interrupt:
            params = pretrain_demo(
                model,
                tokenizer,
                seed,
                self.console,
                CHUNK if self.config.debug.dry_run else MOST,
                self.share,
            )
            if interrupt.requested is not None:  # half a warm-up is nothing to go on from
                raise Interrupted(interrupt.requested)
        return params

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


def with_wrong_sums(rows: list[dict], offs: tuple[int, ...] = (1, 10), each: int = 1) -> list[dict]:
    """The embedded rows as pairs: the sum is chosen, one that is off is not.

    Args:
      rows: of `arithmetic_rows`.
      offs: by how much wrong sums are off, one way or the other.
      each: pairs made of a row.

    >>> from relax.data import arithmetic_rows
    >>> pair = with_wrong_sums(arithmetic_rows("test"))[0]
    >>> [m["content"] for name in ("prompt", "chosen", "rejected") for m in pair[name]]
    ['53+1=', '54', '44']
    """
    # The raw stream of a bit generator is the same in every numpy version.
    words = np.random.PCG64(0).random_raw(len(rows) * each).tolist()
    pairs = []
    for row, word in zip(rows * each, words, strict=True):
        right, off = int(row["completion"][0]["content"]), offs[word % len(offs)]
        wrong = right - off if word // len(offs) % 2 and right >= off else right + off
        rejected = [{"role": "assistant", "content": str(wrong)}]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return pairs
