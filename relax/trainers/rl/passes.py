"""The passes over the completions of a rollout, each in several updates."""

import math
from collections.abc import Iterator

import jax
import numpy as np


def updates_per_pass(
    num_generations: int,
    prompts_per_item: int | None,
    completions_per_update: int | None,
    gradient_accumulation_steps: int,
) -> tuple[int, int | None]:
    """Computes updates per pass over an item, and completions per row (None: not fixed).

    Raises:
      ValueError: the numbers do not divide each other.
    """
    G = num_generations
    if completions_per_update is None:
        return 1, None
    if prompts_per_item is None:
        raise ValueError("completions_per_update needs prompts_per_item: pass both or neither.")
    total = prompts_per_item * G
    micro, rest = divmod(completions_per_update, gradient_accumulation_steps)
    if rest or total % completions_per_update:
        raise ValueError(
            f"completions_per_update must divide the {prompts_per_item} x {G} completions of an "
            f"item and be a multiple of gradient_accumulation_steps, got {completions_per_update} "
            f"and {gradient_accumulation_steps}."
        )
    return total // completions_per_update, math.gcd(micro, G)


def passes(
    arrays: dict[str, np.ndarray], key: jax.Array, *, count: int, updates: int, together: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of every update; if there are several, every pass is shuffled.

    Args:
      arrays: with leading axis N.
      key: of the orders.
      count: number of passes.
      updates: number of updates per pass, a divisor of N.
      together: number of rows in a row that stay together, a divisor of N.
    """
    rows = len(arrays["prompt_ids"])
    size = rows // updates
    for index in range(count):
        order = np.arange(rows)
        if count * updates > 1:
            fresh = jax.random.fold_in(key, index)
            order = np.asarray(jax.random.permutation(fresh, rows // together))
            order = (order[:, None] * together + np.arange(together)[None, :]).reshape(-1)
        for first in range(0, rows, size):
            chosen = order[first : first + size]
            yield {name: value[chosen] for name, value in arrays.items()}
