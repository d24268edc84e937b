"""GRPO and its variants: from a configuration to a model directory."""

import dataclasses
from functools import partial

from relax.config import GRPOConfig
from relax.engine.recipes import rl
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.run import Run, RunResult
from relax.trainers import GRPOTrainer


def train_grpo(config: GRPOConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a model on the rewards of groups of its own completions.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    grpo = config.grpo
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer and the model; the reference of the KL penalty is the initial model.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(
            has_initial_reference=grpo.beta > 0 and not grpo.sync_ref_model
        )

        # 2. The rewards, tools and environment, in processes that can be killed.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, checked against the columns that rewards read, split into rollouts.
        sizes = rollout_sizes(run.config)
        read = partial(
            rl.read_prompts, sizes=sizes, partner=partner, extra_rounds=grpo.max_resample_rounds
        )
        data = run.load_data(
            read, tokenizer, model, kind="prompts", demo_rows=rl.with_answers, rewards=rewards
        )
        params = pretrain_demo(run, model, tokenizer, params)

        # 4. The trainer.
        trainer = GRPOTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            reward_funcs=rewards,
            num_iterations=config.rollout.num_iterations,
            **dataclasses.asdict(grpo),
            **rl.rollout_options(run, data, sizes, tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, roll out, score, update, evaluate, save; then the model directory.
        return run.train(trainer, data, headline=rl.HEADLINE)


def rollout_sizes(config: GRPOConfig) -> rl.Sizes:
    """Sizes of rollouts and updates, from `steps_per_generation`."""
    accumulation, r = config.hyperparams.gradient_accumulation_steps, config.rollout
    updates_per_pass = (r.steps_per_generation or accumulation) // accumulation
    return rl.Sizes.make(config, updates_per_pass=updates_per_pass, passes=r.num_iterations)
