"""A reward model from pairs of completions: `python run_reward.py --help`.

This page is the whole run. Change it here, or copy it; `relax reward` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/reward.py`.
"""

from relax.config import RewardModelConfig
from relax.config.cli import run as run_command


def main(config: RewardModelConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    from functools import partial

    from relax.engine import Run, prepare_process
    from relax.engine.recipes.demo import pretrain_demo
    from relax.engine.recipes.pairs import with_wrong_sums
    from relax.engine.recipes.reward import (
        OFFS,
        SHARE,
        load_scoring_model,
        read_reward_data,
        save_scoring_model,
    )
    from relax.trainers import RewardTrainer

    prepare_process()
    with Run(config) as run:
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
        run.train(
            trainer,
            data,
            headline=("eval_loss", "eval_accuracy", "eval_margin"),
            save=partial(save_scoring_model, run.console),
        )


if __name__ == "__main__":
    run_command(RewardModelConfig, main)
