"""Supervised fine-tuning: `python run_sft.py --help`.

This page is the whole run. Change it here, or copy it; `relax sft` and `TrainerEngine.run_job`
run the same steps from `relax/engine/recipes/sft.py`.
"""

from relax.config import SFTConfig
from relax.config.cli import run as run_command


def main(config: SFTConfig) -> None:
    # Imported here, so that --help and a wrong flag never wait for jax.
    from relax.engine import Run, prepare_process
    from relax.engine.recipes.sft import exact_match_on_demo, loss_options, read_sft_data
    from relax.trainers import SFTTrainer

    prepare_process()
    with Run(config) as run:
        # 1. The tokenizer and the model.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model()

        # 2. The data: rows become labelled tokens and then batches.
        data = run.load_data(read_sft_data, tokenizer, model, kind="completions")

        # 3. Rewards: none. The model learns from labels.

        # 4. The trainer.
        trainer = SFTTrainer(
            model,
            run.make_optimizer(data),
            params=params,
            **loss_options(config),
            exact_matches=data.has_answers,
            sources=data.source_names,
            **run.options(data),
        )

        # 5. Training: resume, update, evaluate, save; then the model directory.
        run.train(
            trainer,
            data,
            headline=("eval_loss", "exact_match_before", "exact_match", "eval_exact_match"),
            evaluate_demo=exact_match_on_demo,
        )


if __name__ == "__main__":
    run_command(SFTConfig, main)
