"""Online DPO: `python run_online_dpo.py --help`.

This page is the whole run. Change it here, or copy it; `relax online_dpo` and
`TrainerEngine.run_job` run the same steps from `relax/engine/recipes/online_dpo.py`.
"""

from relax.config import OnlineDPOConfig
from relax.config.cli import run as run_command


def main(config: OnlineDPOConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    import dataclasses
    from functools import partial

    from relax.config.dpo import WITHOUT_REFERENCE
    from relax.engine import Run, prepare_process
    from relax.engine.recipes import rl
    from relax.engine.recipes.demo import pretrain_demo
    from relax.engine.recipes.online_dpo import rollout_sizes
    from relax.trainers import OnlineDPOTrainer

    prepare_process()
    dpo = config.online_dpo
    with Run(config) as run:
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
        run.train(trainer, data, headline=rl.HEADLINE)


if __name__ == "__main__":
    run_command(OnlineDPOConfig, main)
