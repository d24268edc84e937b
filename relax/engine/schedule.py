"""Length of a run, its optimizer, and its evaluation and save intervals."""

from relax.config import TrainerConfig, resolve_steps
from relax.config.run_rules import OPTIMIZER_FIELDS
from relax.optimizers import OPTIMIZERS, learning_rate_schedule, offload
from relax.optimizers.stochastic_rounding import stochastic_rounding


def total_steps(config: TrainerConfig, updates_per_epoch: int, updates_per_item: int = 1) -> int:
    """Updates of the whole run: `max_steps` rounded up to a whole item, or all epochs."""
    if config.hyperparams.max_steps > 0:
        return -(-config.hyperparams.max_steps // updates_per_item) * updates_per_item
    return config.hyperparams.num_train_epochs * updates_per_epoch


def make_optimizer(config: TrainerConfig, steps: int):
    """Makes the configured optimizer, with its learning rate scheduled over `steps` updates."""
    h = config.hyperparams
    schedule = learning_rate_schedule(
        h.lr_scheduler_type,
        h.learning_rate,
        steps,
        resolve_steps(h.warmup_steps, steps),
        min_lr_rate=h.min_lr_rate,
        num_decay_steps=resolve_steps(h.num_decay_steps, steps),
    )
    arguments = {
        "adam_beta1": "b1",
        "adam_beta2": "b2",
        "adam_epsilon": "eps",
        "momentum_dtype": "mu_dtype",
    }
    settings = {arguments[field]: getattr(h, field) for field in OPTIMIZER_FIELDS[h.optim]}
    optimizer = OPTIMIZERS[h.optim](schedule, weight_decay=h.weight_decay, **settings)
    if h.offload_optimizer:
        optimizer = offload(optimizer)
    if config.model.param_dtype == "bfloat16":
        optimizer = stochastic_rounding(optimizer, h.seed)
    return optimizer


def eval_interval(config: TrainerConfig, steps: int) -> int | None:
    """`eval_steps` of `Trainer.train`: None: after every epoch; 0: only at the end of the run."""
    inference = config.inference
    if inference.eval_strategy == "steps":
        return resolve_steps(inference.eval_steps or config.output.logging_steps, steps)
    return None if inference.eval_strategy == "epoch" else 0


def save_interval(config: TrainerConfig, steps: int) -> int | None:
    """`save_steps` of `Trainer.train`: 0: after every epoch; None: only at the end of the run."""
    output = config.output
    if output.save_strategy == "steps":
        return resolve_steps(output.save_steps, steps)
    return 0 if output.save_strategy == "epoch" else None
