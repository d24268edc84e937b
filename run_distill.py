"""Distillation: `python run_distill.py --help`.

This page is the whole run. Change it here, or copy it; `relax distill` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/distill.py`.
"""

from relax.config import DistillConfig
from relax.config.cli import run as run_command


def main(config: DistillConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    from relax.engine import Run, prepare_process
    from relax.engine.recipes import rl
    from relax.engine.recipes.distill import (
        HEADLINE,
        distill_options,
        evaluate_teacher,
        find_teachers,
        load_teachers,
        read_distill_data,
        rollout_sizes,
        with_answers,
    )
    from relax.trainers import DistillationTrainer

    prepare_process()
    with Run(config) as run:
        # 1. The tokenizer, the student, and the teachers, whose tokens must be the student's.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(
            has_initial_reference=config.distill.teacher_logprobs is None
        )
        sources = run.attempt(find_teachers, config, tokenizer)

        # 2. The rewards, if any: for metrics alone; and what answers the student, if anything.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, and completions for the share of rows that is off-policy.
        data = run.load_data(
            read_distill_data,
            tokenizer,
            model,
            kind="completions" if config.distill.lmbda < 1 else "prompts",
            demo_rows=with_answers,
            rewards=rewards,
            teachers=sources,
        )
        teachers = load_teachers(run, sources, model, tokenizer)

        # 4. The trainer.
        trainer = DistillationTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            teachers=teachers,
            reward_funcs=rewards,
            **distill_options(config),
            **rl.rollout_options(run, data, rollout_sizes(run.config), tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, write, update, evaluate, save; then the model directory.
        run.train(trainer, data, headline=HEADLINE, evaluate_demo=evaluate_teacher)


if __name__ == "__main__":
    run_command(DistillConfig, main)
