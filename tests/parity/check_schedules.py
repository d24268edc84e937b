"""Learning rates of every update, against transformers' `get_scheduler`."""

import numpy as np
import pytest
import torch
from transformers import SchedulerType, get_scheduler

from relax.config.foreign import nearest_value, own_value
from relax.optimizers import learning_rate_schedule
from relax.optimizers.schedules import SCHEDULES

SECTION = "Learning-rate schedules"
PEAK, STEPS = 3e-4, 40
NAMES = {"wsd": "warmup_stable_decay"}  # transformers' own, where it differs
# Our options, and transformers' lr_scheduler_kwargs.
CASES = {
    "linear": ({}, {}),
    "cosine": ({}, {}),
    "constant": ({}, {}),
    "constant_with_warmup": ({}, {}),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
    "wsd": (
        {"min_lr_rate": 0.05, "num_decay_steps": 9},
        {"min_lr_ratio": 0.05, "num_decay_steps": 9},
    ),
}


def theirs(kind, warmup, steps=STEPS, peak=PEAK, more=0, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(NAMES.get(kind, kind), optimizer, warmup, steps, kwargs)
    rates = []
    for _ in range(steps + more):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def ours(kind, warmup, steps=STEPS, peak=PEAK, more=0, **options):
    schedule = learning_rate_schedule(kind, peak, steps, warmup, **options)
    return np.array([float(schedule(n)) for n in range(steps + more)])


@pytest.mark.parametrize("kind", SCHEDULES)
def check_every_rate(parity, kind):
    options, kwargs = CASES[kind]
    for warmup in (0, 1, 7):
        pair = ours(kind, warmup, **options), theirs(kind, warmup, **kwargs)
        parity.equal(f"`{kind}`", "transformers", f"{STEPS} rates, {warmup} of warm-up", *pair)


def check_rates_behind_the_last_update(parity):
    for kind in ("linear", "constant_with_warmup"):
        pair = [rates(kind, 3, steps=20, more=5) for rates in (ours, theirs)]
        parity.equal(f"`{kind}`", "transformers", "5 updates too many", *pair)


def check_what_is_not_there(parity):
    for kind in (kind.value for kind in SchedulerType):
        if own_value("lr_scheduler_type", kind) not in SCHEDULES:
            why = nearest_value("lr_scheduler_type", kind).removeprefix("; ")
            parity.missing(f"`--lr_scheduler_type {kind}`", "transformers", why)
