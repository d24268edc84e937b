"""GRPO and its variants: `python run_grpo.py --help`.

This page is the whole run. Change it here, or copy it; `relax grpo` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/grpo.py`.
"""

from relax.config import GRPOConfig
from relax.config.cli import run as run_command


def main(config: GRPOConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    import dataclasses
    from functools import partial

    from relax.engine import Run, prepare_process
    from relax.engine.recipes import rl
    from relax.engine.recipes.demo import pretrain_demo
    from relax.engine.recipes.grpo import rollout_sizes
    from relax.trainers import GRPOTrainer

    prepare_process()
    grpo = config.grpo
    with Run(config) as run:
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
        run.train(trainer, data, headline=rl.HEADLINE)


if __name__ == "__main__":
    run_command(GRPOConfig, main)
