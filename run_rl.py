"""PPO: `python run_rl.py --help`.

This page is the whole run. Change it here, or copy it; `relax ppo` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/ppo.py`.
"""

from relax.config import PPOConfig
from relax.config.cli import run as run_command


def main(config: PPOConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    from functools import partial

    from relax.engine import Run, prepare_process
    from relax.engine.recipes import rl
    from relax.engine.recipes.demo import pretrain_demo
    from relax.engine.recipes.ppo import (
        critic_options,
        find_critic,
        optimizers,
        ppo_options,
        rollout_sizes,
    )
    from relax.trainers import PPOTrainer

    prepare_process()
    ppo = config.ppo
    with Run(config) as run:
        # 1. The tokenizer, the model, and the critic if it has its own files.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(has_initial_reference=ppo.kl_coef > 0)
        critic = run.attempt(find_critic, ppo.value_model, tokenizer)

        # 2. The rewards, tools and environment, in processes that can be killed.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, checked against the columns that rewards read, split into rollouts.
        sizes = rollout_sizes(run.config)
        read = partial(rl.read_prompts, sizes=sizes, partner=partner, critic=critic)
        data = run.load_data(
            read, tokenizer, model, kind="prompts", demo_rows=rl.with_answers, rewards=rewards
        )
        params = pretrain_demo(run, model, tokenizer, params)

        # 4. The trainer.
        policy_optimizer, critic_optimizer = optimizers(run.config, run.steps(data))
        trainer = PPOTrainer(
            model,
            policy_optimizer,
            critic_optimizer=critic_optimizer,
            params=params,
            reward_funcs=rewards,
            **critic_options(run, model, critic),
            **ppo_options(config),
            **rl.rollout_options(run, data, sizes, tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, roll out, score, update, evaluate, save; then the model directory.
        run.train(trainer, data, headline=rl.HEADLINE)


if __name__ == "__main__":
    run_command(PPOConfig, main)
