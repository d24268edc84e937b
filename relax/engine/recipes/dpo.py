"""DPO and related losses: from a configuration to a model directory."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

from relax.callbacks.reference import ReferenceLogprobs
from relax.config import DPOConfig
from relax.config.dpo import KTO
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.recipes.pairs import PairsData, read_pairs, with_wrong_sums
from relax.engine.run import Run, RunResult
from relax.models.trainable import merge
from relax.trainers import DPOTrainer

HEADLINE = (
    "eval_loss",
    "eval_rewards/accuracies",
    "pair_accuracy_before",
    "pair_accuracy",
    "chosen_logprob_before",
    "chosen_logprob",
)


def train_dpo(config: DPOConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a model on pairs of completions, or on single ones with KTO.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    dpo = config.dpo
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model; the reference is the initial model.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(
            has_initial_reference=not dpo.sync_ref_model and not dpo.precompute_ref_log_probs
        )

        # 2. The data: prompts with a chosen and a rejected completion.
        data = run.load_data(
            read_dpo_data, tokenizer, model, kind="preferences", demo_rows=with_wrong_sums
        )
        params = pretrain_demo(run, model, tokenizer, params)

        # 3. Rewards: none. They are implicit in the log-ratios of the two completions.
        reference = reference_logprobs(run, data)

        # 4. The trainer.
        trainer = DPOTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            precomputed=dpo.precompute_ref_log_probs,
            **loss_options(config),
            sources=data.source_names,
            **run.options(data, *reference),
        )

        # 5. Training: resume, update, evaluate, save; then the model directory.
        return run.train(trainer, data, headline=HEADLINE, evaluate_demo=pair_accuracy_on_demo)


def read_dpo_data(config: DPOConfig, tokenizer, **parts) -> PairsData:
    """Reads pairs, or labelled single completions for KTO, see `read_pairs`."""
    data = read_pairs(config, tokenizer, unpaired=config.dpo.loss_type == [KTO], **parts)
    if not config.dpo.precompute_ref_log_probs:
        return data

    def fill_batch(item):
        return item | {"ref_logprobs": np.zeros((*item["index"].shape, 2), np.float32)}

    return dataclasses.replace(data, fill_batch=fill_batch)


def loss_options(config: DPOConfig) -> dict:
    """The options of `DPOTrainer` that are fields of `config.dpo`."""
    options = dataclasses.asdict(config.dpo)
    for name in ("precompute_ref_log_probs", "ref_log_probs_dir"):
        options.pop(name)
    return options


def reference_logprobs(run: Run[DPOConfig], data: PairsData) -> tuple:
    """The callback that precomputes the reference's log-probabilities, if configured."""
    dpo = run.config.dpo
    if not dpo.precompute_ref_log_probs:
        return ()
    named = dpo.ref_log_probs_dir
    directory = Path(named) if named else run.run_dir.path / "reference"
    return (ReferenceLogprobs(data.loaders, directory, run.console),)


def pair_accuracy_on_demo(
    console: Console, when: str, trainer, state, data: PairsData
) -> dict[str, float]:
    """Measures how often the right sum of a held-out pair is more likely than the wrong one."""
    if data.eval is None or not trainer.is_paired:
        return {}
    params = merge(state.eval_params, state.frozen)
    rows = []
    for batch in data.eval:
        mask = batch["index"].reshape(-1) >= 0
        rows.append(trainer.answer_logprobs(params, batch)[mask])
    chosen, rejected = np.concatenate(rows).T
    right, logprob = float((chosen > rejected).mean()), float(chosen.mean())
    console.print(
        f"held-out pairs {when} training: the right sum is more likely in {right:.1%}; mean "
        f"log-probability of right sums {logprob:.2f}, of wrong ones {rejected.mean():.2f}"
    )
    suffix = "_before" if when == "before" else ""
    return {f"pair_accuracy{suffix}": right, f"chosen_logprob{suffix}": logprob}
