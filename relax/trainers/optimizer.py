"""AdamW and the course of its learning rate, as transformers' Trainer has them."""

import jax
import optax


def learning_rate_schedule(
    kind: str, learning_rate: float, total_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """The learning rate of update n, counted from 0.

    Warm-up rises linearly from 0, and is over at update `warmup_steps`. Then `linear` falls to 0
    at `total_steps`, `cosine` falls along half a cosine, `constant` and `constant_with_warmup`
    stay.

    >>> schedule = learning_rate_schedule("linear", 1.0, total_steps=10, warmup_steps=2)
    >>> [float(schedule(n)) for n in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    if kind == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, decay_steps)
    elif kind in ("constant", "constant_with_warmup"):
        after = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(
            f"unknown schedule {kind!r}. Known: linear, cosine, constant, constant_with_warmup."
        )
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW whose state tells the learning rate; norms and biases do not decay.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def make(learning_rate):
        return optax.adamw(
            learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices
        )

    return optax.inject_hyperparams(make)(learning_rate=schedule)
