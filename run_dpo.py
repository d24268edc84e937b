"""Direct preference optimisation and related losses: `python run_dpo.py --help`.

This page is the whole run. Change it here, or copy it; `relax dpo` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/dpo.py`.
"""

from relax.config import DPOConfig
from relax.config.cli import run as run_command


def main(config: DPOConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    from relax.engine import Run, prepare_process
    from relax.engine.recipes.demo import pretrain_demo
    from relax.engine.recipes.dpo import (
        HEADLINE,
        loss_options,
        pair_accuracy_on_demo,
        read_dpo_data,
        reference_logprobs,
    )
    from relax.engine.recipes.pairs import with_wrong_sums
    from relax.trainers import DPOTrainer

    prepare_process()
    dpo = config.dpo
    with Run(config) as run:
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
        run.train(trainer, data, headline=HEADLINE, evaluate_demo=pair_accuracy_on_demo)


if __name__ == "__main__":
    run_command(DPOConfig, main)
