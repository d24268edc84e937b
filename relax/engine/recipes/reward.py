"""Reward models: from a configuration to the directory of a sequence classifier."""

from functools import partial

import jax
from rich.console import Console

from relax.config import RewardModelConfig
from relax.engine.model_source import ModelSource
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.recipes.pairs import PairsData, read_pairs, with_wrong_sums
from relax.engine.run import Run, RunResult
from relax.models.families import family_of
from relax.models.heads import init_head, with_head
from relax.models.huggingface.classifiers import (
    class_of,
    load_classifier,
    padded,
    save_classifier,
)
from relax.models.huggingface.pretrained import is_classifier
from relax.trainers import RewardTrainer

# Differences of wrong sums: many kinds, since a policy exploits any error that was never rejected.
OFFS = (*range(1, 21), *range(30, 101, 10))
SHARE = 0.95  # right sums at which pretraining ends: to score digits, the model must know them


def train_reward(config: RewardModelConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a model with a score head on pairs of completions.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model: a classifier, or a language model with a new head.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(load=partial(load_scoring_model, run))

        # 2. The data: prompts with a chosen and a rejected completion.
        demo_rows = partial(with_wrong_sums, offs=OFFS, each=3)
        data = run.load_data(
            read_reward_data, tokenizer, model, kind="preferences", demo_rows=demo_rows
        )
        params = pretrain_demo(run, model, tokenizer, params, SHARE)

        # 3. Rewards: this model learns them.

        # 4. The trainer.
        trainer = RewardTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            center_rewards_coefficient=config.reward_model.center_rewards_coefficient,
            sources=data.source_names,
            **run.options(data),
        )

        # 5. Training: resume, update, evaluate, save; then the classifier's directory.
        return run.train(
            trainer,
            data,
            headline=("eval_loss", "eval_accuracy", "eval_margin"),
            save=partial(save_scoring_model, run.console),
        )


def read_reward_data(config: RewardModelConfig, tokenizer, **parts) -> PairsData:
    """Reads pairs whose completions end as in scoring, see `read_pairs`."""
    return read_pairs(config, tokenizer, for_reward_model=True, **parts)


def load_scoring_model(run: Run[RewardModelConfig], dtype, **options):
    """Loads `(model, params)`: a classifier, or a language model's trunk with a new head."""
    source: ModelSource = run.source
    if not source.is_adapter and is_classifier(source.files):
        return load_classifier(source.files, dtype, **options)
    model, params = source.load(dtype, **options)
    class_of(family_of(model.config.model_type))  # refuses families that cannot be saved so
    run.console.print(
        f"new score head: '{source.path}' is a language model without one", markup=False
    )
    key = jax.random.key(run.config.hyperparams.seed)
    return model, with_head(params, init_head(key, model.config, dtype=model.param_dtype))


def save_scoring_model(console: Console, path, model, params, tokenizer, *, generation_config=None):
    """Writes the directory of a sequence classifier, and reports its padding token."""
    del generation_config  # a classifier does not generate
    pad, own = padded(tokenizer).pad_token, tokenizer.pad_token
    if pad is None:
        console.print("no padding token: transformers will score one text at a time")
    elif pad != own:
        console.print(
            f"saved with padding token {pad} instead of {own}: transformers would not read the "
            "score at an end token",
            markup=False,
        )
    return save_classifier(path, model, params, tokenizer)
