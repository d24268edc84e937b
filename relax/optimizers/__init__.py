"""Optimizers and learning-rate schedules under transformers' names."""

from relax.optimizers.host import lies_on_host, offload, select
from relax.optimizers.optimizers import (
    OPTIMIZERS,
    adafactor,
    adamw,
    adamw_8bit,
    eval_params,
    learning_rate,
    lion,
    muon,
    schedule_free_adamw,
    sgd,
)
from relax.optimizers.schedules import SCHEDULES, learning_rate_schedule
from relax.optimizers.wrappers import freeze_for, partition_by_key

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "adafactor",
    "adamw",
    "adamw_8bit",
    "eval_params",
    "freeze_for",
    "learning_rate",
    "learning_rate_schedule",
    "lies_on_host",
    "lion",
    "muon",
    "offload",
    "partition_by_key",
    "schedule_free_adamw",
    "select",
    "sgd",
]
