"""Learning-rate schedules under transformers' names."""

import optax

from relax.errors import ConfigError

SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup"),
    *("cosine_with_min_lr", "wsd"),
)


def learning_rate_schedule(
    kind: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr_rate: float = 0.0,
    num_decay_steps: int = 1,
) -> optax.Schedule:
    """Learning rate of update n, counted from 0, as in transformers' `get_scheduler`.

    The warm-up rises linearly from 0 until update `warmup_steps`. Then `linear` decays to 0 at
    `total_steps`, `cosine` decays along half a cosine, and `constant_with_warmup` is constant.
    `cosine_with_min_lr` decays to `min_lr_rate` of the peak. `wsd` (warm-up, stable, decay) is
    constant and decays along half a cosine in the last `num_decay_steps` updates; it starts and
    ends at `min_lr_rate` of the peak. `constant` has no warm-up and ignores `warmup_steps`.

    Args:
      kind: one of `SCHEDULES`.
      learning_rate: the peak.
      total_steps: updates of the run.
      warmup_steps: updates of the warm-up.
      min_lr_rate: in [0, 1), for `cosine_with_min_lr` and `wsd`.
      num_decay_steps: updates (>= 1), for `wsd`.

    Returns:
      A function of the update's number.

    Raises:
      ConfigError: the kind is unknown, or the phases of `wsd` are longer than the run.

    Example:
      >>> schedule = learning_rate_schedule("linear", 1.0, total_steps=10, warmup_steps=2)
      >>> [float(schedule(n)) for n in (0, 1, 2, 6, 10)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    References:
      Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395, section 4 (wsd)
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"unknown schedule {kind!r}. Known: {', '.join(SCHEDULES)}.")
    if kind == "constant":
        return optax.constant_schedule(learning_rate)
    floor = min_lr_rate if kind in ("cosine_with_min_lr", "wsd") else 0.0
    stable_steps = total_steps - warmup_steps - num_decay_steps if kind == "wsd" else 0
    if stable_steps < 0:
        raise ConfigError(
            "warmup_steps and num_decay_steps must fit into the run, got "
            f"{warmup_steps} + {num_decay_steps} of {total_steps} updates. Lower one of them."
        )
    decay_steps = max(total_steps - warmup_steps - stable_steps, 1)
    after = stable = optax.constant_schedule(learning_rate)
    if kind == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind != "constant_with_warmup":
        after = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=floor)
    if stable_steps:
        after = optax.join_schedules([stable, after], [stable_steps])
    if not warmup_steps:
        return after
    begin = learning_rate * floor if kind == "wsd" else 0.0
    warmup = optax.linear_schedule(begin, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
