"""Pretraining of the demo model, from which other algorithms start if no model is named."""

import jax

from relax.callbacks.progress import working
from relax.config import SFTConfig
from relax.data import arithmetic_rows
from relax.engine.recipes.sft import read_sft_data
from relax.engine.rows import read_sources
from relax.optimizers import adamw, learning_rate_schedule
from relax.trainers import SFTTrainer
from relax.trainers.interrupt import Interrupt, Interrupted

SHARE = 0.5  # share of right sums at which the pretraining of a policy ends
CHUNK, MOST = 10, 800  # updates between evaluations, and maximum number of updates
EVALUATED = 500  # training rows used for evaluation


def pretrain_demo(run, model, tokenizer, params, share: float = SHARE, *, stream: int = 0):
    """Fine-tunes the demo model until it gets a share of the sums right.

    Rewards teach best at about half: a model that is always wrong has no completions to compare.

    Args:
      run: the `Run` that starts from the parameters.
      params: returned unchanged if there are any, or if a checkpoint supplies them.
      stream: added to the seed, for a model with other initial weights.
    """
    if params is not None or (run.resume_from is not None and not run.keeps_frozen):
        return params
    seed = run.config.hyperparams.seed + stream
    most = CHUNK if run.is_dry else MOST
    config = SFTConfig().replace(**SFTConfig.demo, seed=seed)
    train, evaluated = (
        read_sft_data(
            config,
            tokenizer,
            model_config=model.config,
            sources=read_sources(config, "completions", run.console, (rows, None)),
        )
        for rows in (arithmetic_rows("train"), arithmetic_rows("train")[:EVALUATED])
    )
    schedule = learning_rate_schedule("constant_with_warmup", 1e-3, MOST, 50)
    optimizer = adamw(schedule, b2=0.95, weight_decay=0.1)
    trainer = SFTTrainer(model.clone(lora=None), optimizer, max_grad_norm=1.0)
    state, right, steps = trainer.create_train_state(jax.random.key(seed)), 0.0, 0
    with working(run.console, "fine-tuning the demo model") as report, Interrupt() as interrupt:
        while right < share and steps < most:
            steps += CHUNK
            state = trainer.train(train.train, num_epochs=100, state=state, max_steps=steps)
            examples = evaluated.train.examples
            right = trainer.exact_match(state, evaluated.make_plain_loader(examples))
            report(f"{right:.0%} of sums right, until {share:.0%}; {steps} updates")
            asked = interrupt.agree()
            if asked is not None:  # a partial pretraining cannot be resumed
                raise Interrupted(asked)
    run.console.print(
        f"pretrained the demo model: {steps} supervised updates, {right:.0%} of the sums are right"
    )
    return state.params
