"""Pairs of completions as the data of a run, for DPO, its variants and reward models."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from relax.data import PreferenceLoader, Preferences, prepare_preferences
from relax.engine.rows import Data, Sources, data_seed, limits_of, rows_plan
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig


@dataclasses.dataclass(frozen=True)
class PairsData(Data):
    """Data of pairs.

    Attributes:
      loaders: the loader of each set by title.
    """

    loaders: dict[str, PreferenceLoader] = dataclasses.field(default_factory=dict)


def read_pairs(
    config,
    tokenizer,
    *,
    model_config: TransformerConfig,
    sources: Sources,
    **reading,
) -> PairsData:
    """Tokenises the pairs of every set and batches them.

    Args:
      config: the configuration of DPO or of a reward model.
      **reading: `unpaired` or `for_reward_model`, see `prepare_preferences`.

    Raises:
      RelaxError: all problems of all sets together.
    """
    d, reports, loaders, digest = config.data, {}, {}, ""
    found = ErrorList()
    for name, rows in sources.sets.items():
        with found.catch():
            preferences, reports[name] = prepare_preferences(
                rows,
                tokenizer,
                **reading,
                system_prompt=sources.system_prompt,
                eos_token=d.eos_token,
                max_length=d.max_length,
                truncation_mode=d.truncation_mode,
                vocab_size=model_config.vocab_size,
                limits=limits_of(config),
                cache=sources.cache,
            )
            loader = _loader(config, preferences, training=name == sources.training)
            if loader.longest_row > model_config.max_position_embeddings:
                raise DataError(
                    f"{name}: rows are up to {loader.longest_row} tokens long, and the model "
                    f"has {model_config.max_position_embeddings} positions. "
                    f"Pass --max_length {model_config.max_position_embeddings}."
                )
            loaders[name] = loader
            digest += f"{preferences.digest:08x}"
    with found.catch():
        _check_margins(loaders)
    found.raise_all()

    def show(console) -> None:
        for name, report in reports.items():
            console.rule(name, align="left", style="dim")
            for line in report.lines():
                console.print(line, markup=False)
            loader = loaders[name]
            if loader.packed_length is not None:
                console.print(
                    f"packing      {len(loader.rows):,} rows of {loader.packed_length:,} tokens, "
                    f"{loader.fill:.1%} full"
                )
            if name == sources.training and config.debug.print_examples:
                prompt, first, second = report.example
                console.print(f"{prompt}«{first}»«{second}»", markup=False)

    return PairsData(
        train=loaders[sources.training],
        eval=sources.eval_loaders(loaders),
        reports=reports,
        digest=digest,
        plan=rows_plan(config),
        show=show,
        stop_sequences=sources.stop_sequences,
        loaders=loaders,
    )


def _check_margins(loaders: dict[str, PreferenceLoader]) -> None:
    """Refuses margins that only some sets have."""
    margins = {name: loader.preferences.has_margins for name, loader in loaders.items()}
    if len(set(margins.values())) > 1:
        without = next(name for name, has in margins.items() if not has)
        raise DataError(
            f"{without} have no 'margin', which other sets have: their losses would differ in "
            "kind. Give the column to all sets, or to none."
        )


def _loader(config, preferences: Preferences, *, training: bool) -> PreferenceLoader:
    h, d = config.hyperparams, config.data
    rows = config.inference.per_device_eval_batch_size
    if training:
        rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
    return PreferenceLoader(
        preferences,
        rows,
        seed=data_seed(config),
        shuffle=training and d.shuffle_dataset,
        packed_length=2 * d.max_length if d.pack_pairs else None,
    )


def with_wrong_sums(rows: list[dict], offs: Sequence[int] = (1, 10), each: int = 1) -> list[dict]:
    """Makes pairs of demo rows: the right sum is chosen, a wrong one is rejected.

    Args:
      rows: rows of `arithmetic_rows`.
      offs: differences of a wrong sum from the right one, up or down.
      each: pairs per row.

    >>> from relax.data import arithmetic_rows
    >>> pair = with_wrong_sums(arithmetic_rows("test"))[0]
    >>> [m["content"] for name in ("prompt", "chosen", "rejected") for m in pair[name]]
    ['53+1=', '54', '44']
    """
    # The raw stream of a bit generator does not depend on the numpy version.
    words = np.random.PCG64(0).random_raw(len(rows) * each).tolist()
    pairs = []
    for row, word in zip(rows * each, words, strict=True):
        right, off = int(row["completion"][0]["content"]), offs[word % len(offs)]
        wrong = right - off if word // len(offs) % 2 and right >= off else right + off
        rejected = [{"role": "assistant", "content": str(wrong)}]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return pairs
