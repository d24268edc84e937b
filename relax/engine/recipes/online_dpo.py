"""Online DPO: from a configuration to a model directory."""

import dataclasses
from functools import partial

from relax.config import OnlineDPOConfig
from relax.config.dpo import WITHOUT_REFERENCE
from relax.engine.recipes import rl
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.run import Run, RunResult
from relax.trainers import OnlineDPOTrainer


def train_online_dpo(
    config: OnlineDPOConfig, train_rows=None, eval_rows=None, **where
) -> RunResult:
    """Trains a model to prefer the best of its own completions to the worst.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    dpo = config.online_dpo
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model; the reference is the initial model.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(
            has_initial_reference=dpo.loss_type not in WITHOUT_REFERENCE and not dpo.sync_ref_model
        )

        # 2. The rewards, tools and environment, in processes that can be killed.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, checked against the columns that rewards read, split into rollouts.
        sizes = rollout_sizes(run.config)
        read = partial(rl.read_prompts, sizes=sizes, partner=partner)
        data = run.load_data(
            read, tokenizer, model, kind="prompts", demo_rows=rl.with_answers, rewards=rewards
        )
        params = pretrain_demo(run, model, tokenizer, params)

        # 4. The trainer.
        trainer = OnlineDPOTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            reward_funcs=rewards,
            **dataclasses.asdict(dpo),
            **rl.rollout_options(run, data, sizes, tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, roll out, score, update, evaluate, save; then the model directory.
        return run.train(trainer, data, headline=rl.HEADLINE)


def rollout_sizes(config: OnlineDPOConfig) -> rl.Sizes:
    """Sizes of rollouts: each is one update."""
    return rl.Sizes.make(config, updates_per_pass=1, passes=1)
