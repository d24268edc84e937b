"""Supervised fine-tuning: from a configuration to a model directory."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

from rich.console import Console

from relax.config import SFTConfig
from relax.data import DataLoader, FormatOptions, prepare, render
from relax.engine.rows import Data, Sources, data_seed, limits_of, rows_plan
from relax.engine.run import Run, RunResult
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig
from relax.trainers import SFTTrainer


def train_sft(config: SFTConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Fine-tunes a model on labelled tokens.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model()

        # 2. The data: rows become labelled tokens and then batches.
        data = run.load_data(read_sft_data, tokenizer, model, kind="completions")

        # 3. Rewards: none. The model learns from labels.

        # 4. The trainer.
        trainer = SFTTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            **loss_options(config),
            exact_matches=data.has_answers,
            sources=data.source_names,
            **run.options(data),
        )

        # 5. Training: resume, update, evaluate, save; then the model directory.
        return run.train(
            trainer,
            data,
            headline=("eval_loss", "exact_match_before", "exact_match", "eval_exact_match"),
            evaluate_demo=exact_match_on_demo,
        )


def loss_options(config: SFTConfig) -> dict[str, Any]:
    """The options of `SFTTrainer` that are fields of `config.sft`; the others are of the data."""
    names = ("loss_type", "label_smoothing_factor", "z_loss_coef", "neftune_noise_alpha")
    return {name: getattr(config.sft, name) for name in (*names, "loss_chunk_size")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTData(Data):
    """Data of SFT.

    Attributes:
      has_answers: whether only parts of rows are trained on, so that exact matches are worth
        counting; whole texts hardly ever match, and checking them costs time.
      make_plain_loader: makes an evaluation loader of examples, one per row, in the given order.
    """

    has_answers: bool = False
    make_plain_loader: Callable[[Any], DataLoader]


def read_sft_data(
    config: SFTConfig, tokenizer, *, model_config: TransformerConfig, sources: Sources
) -> SFTData:
    """Tokenises the rows of every set and batches them.

    Raises:
      RelaxError: all problems of all sets together.
    """
    loaders, reports, digest = {}, {}, 0
    found = ErrorList()
    for name, rows in sources.sets.items():
        training = name == sources.training
        with found.catch():
            strategy = _packing(config, training=training)
            options = _format_options(config, sources, strategy)
            examples, reports[name] = prepare(
                rows, tokenizer, options, model_config.vocab_size, sources.cache
            )
            loaders[name] = _loader(config, examples, strategy, training=training)
            if strategy:
                reports[name] = reports[name].with_packing(strategy, loaders[name])
            digest = zlib.crc32(repr(examples.checksums).encode(), digest)
            longest = max(loaders[name].bucket_lengths)
            if longest > model_config.max_position_embeddings:
                raise DataError(
                    f"{name}: batches are up to {longest} tokens long, and the model has "
                    f"{model_config.max_position_embeddings} positions. "
                    f"Pass --max_length {model_config.max_position_embeddings}."
                )
    found.raise_all()

    def show(console) -> None:
        for name, report in reports.items():
            examples = config.debug.print_examples if name == sources.training else 0
            render(report, console, examples, title=name)

    return SFTData(
        train=loaders[sources.training],
        eval=sources.eval_loaders(loaders),
        reports=reports,
        digest=f"{digest:08x}",
        plan=rows_plan(config),
        show=show,
        stop_sequences=sources.stop_sequences,
        has_answers=reports[sources.training].trained_on != "every token",
        make_plain_loader=lambda examples: _loader(config, examples, None, training=False),
    )


def exact_match_on_demo(
    console: Console, when: str, trainer, state, data: SFTData
) -> dict[str, float]:
    """Measures the share of held-out sums that the model gets right."""
    share = trainer.exact_match(state, data.make_plain_loader(data.eval.examples))
    console.print(f"held-out exact match {when} training: {share:.1%}")
    return {"exact_match_before" if when == "before" else "exact_match": share}


def _format_options(config: SFTConfig, sources: Sources, strategy: str | None) -> FormatOptions:
    d, sft = config.data, config.sft
    # The two strategies that split long rows keep every token, so rows are not truncated first.
    splits = strategy not in (None, "bfd")
    return FormatOptions(
        text_field=d.dataset_text_field,
        completion_only_loss=sft.completion_only_loss,
        assistant_only_loss=sft.assistant_only_loss,
        train_on=sft.train_on,
        thinking=sft.thinking,
        system_prompt=sources.system_prompt,
        eos_token=d.eos_token,
        max_length=None if splits else d.max_length,
        truncation_mode=d.truncation_mode,
        limits=limits_of(config),
    )


def _packing(config: SFTConfig, *, training: bool) -> str | None:
    d = config.data
    packs = d.packing if training or d.eval_packing is None else d.eval_packing
    return d.packing_strategy if packs else None


def _loader(config: SFTConfig, examples, packing: str | None, *, training: bool):
    h, d = config.hyperparams, config.data
    rows = config.inference.per_device_eval_batch_size
    if training:
        rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
    return DataLoader(
        examples,
        rows,
        seed=data_seed(config),
        shuffle=training and d.shuffle_dataset,
        packing=packing,
        max_length=d.max_length if packing else None,
        pad_to_multiple_of=d.pad_to_multiple_of or 8,
    )
