"""A reward model, from its configuration to the directory of a sequence classifier."""

from functools import partial

import jax
from rich.console import Console

from relax.config import RewardModelConfig
from relax.engine.model_source import ModelSource
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.recipes.pairs import PairsData, read_pairs, with_wrong_sums
from relax.engine.run import Run, RunResult
from relax.models.heads import init_head, with_head
from relax.models.huggingface.classifiers import load_classifier, padded, save_classifier
from relax.models.huggingface.pretrained import is_classifier
from relax.trainers import RewardTrainer

# By how much wrong sums are off. A policy errs in every way, and finds what was never called wrong.
OFFS = (*range(1, 21), *range(30, 101, 10))
SHARE = 0.95  # of sums that the demo model knows first: a judge of single digits must know them


def train_reward(config: RewardModelConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a model with a head to score completions, from pairs of them.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model: a classifier, or a language model that gets a fresh head.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(load=partial(load_scoring_model, run))

        # 2. The data: prompts with a chosen and a rejected completion.
        demo_rows = partial(with_wrong_sums, offs=OFFS, each=3)
        data = run.load_data(
            read_reward_data, tokenizer, model, kind="preferences", demo_rows=demo_rows
        )
        params = pretrain_demo(run, model, tokenizer, params, SHARE)

        # 3. Rewards: what is learned here.

        # 4. The trainer.
        trainer = RewardTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            center_rewards_coefficient=config.reward_model.center_rewards_coefficient,
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
    """`read_pairs`; completions end as a reward model meets them."""
    return read_pairs(config, tokenizer, judges=True, **parts)


def load_scoring_model(run: Run[RewardModelConfig], dtype, **options):
    """A sequence classifier, or a language model's trunk with a fresh head: `(model, params)`."""
    source: ModelSource = run.source
    if not source.is_adapter and is_classifier(source.files):
        return load_classifier(source.files, dtype, **options)
    model, params = source.load(dtype, **options)
    run.console.print(
        f"the head is fresh: '{source.path}' is a language model, which has none", markup=False
    )
    key = jax.random.key(run.config.hyperparams.seed)
    return model, with_head(params, init_head(key, model.config, dtype=model.param_dtype))


def save_scoring_model(console: Console, path, model, params, tokenizer, *, generation_config=None):
    """Writes the directory of a sequence classifier, and says what it uses for padding."""
    del generation_config  # a classifier does not generate
    pad, own = padded(tokenizer).pad_token, tokenizer.pad_token
    if pad is None:
        console.print("no token to pad with: transformers will score one text at a time")
    elif pad != own:
        console.print(
            f"saved with {pad} for padding in place of {own}: at an end token transformers would "
            "not read the score",
            markup=False,
        )
    return save_classifier(path, model, params, tokenizer)
