"""How far steps with moments in 8 bits are from those with float32, on random gradients.

    python benchmarks/moments.py

One matrix, gradients with a part that stays and a part that changes. Printed is, after n updates,
the mean distance of a step from that of AdamW, and of the sum of all steps, relative to their size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from relax.optimizers import adamw, adamw_8bit

SHAPE = (64, 256)


def gradient(n: int) -> dict:
    """The gradient of update n."""
    keep, change = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (0, n + 1))
    return {"kernel": (keep + change) * jnp.exp(2 * jax.random.normal(jax.random.key(7), SHAPE))}


def main() -> None:
    """Prints a line per number of updates."""
    params = {"kernel": jnp.zeros(SHAPE)}
    optimizers = adamw(1e-3), adamw_8bit(1e-3)
    states = [optimizer.init(params) for optimizer in optimizers]
    updates = [jax.jit(optimizer.update) for optimizer in optimizers]
    sums = [np.zeros(SHAPE), np.zeros(SHAPE)]
    for n in range(1, 1001):
        steps = []
        for i, update in enumerate(updates):
            step, states[i] = update(gradient(n), states[i], params)
            steps.append(np.asarray(step["kernel"]))
            sums[i] = sums[i] + steps[i]
        if n in (1, 2, 10, 30, 100, 300, 1000):
            off, moved = (np.abs(b - a).mean() / np.abs(a).mean() for a, b in (steps, sums))
            print(f"{n:5} updates: a step is off by {off:.2%}, their sum by {moved:.2%}")


if __name__ == "__main__":
    main()
