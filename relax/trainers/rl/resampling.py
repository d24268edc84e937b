"""Replacement of groups of equal rewards (dynamic sampling).

Axes: P prompts, G completions of a group.
"""

import numpy as np

from relax.trainers.rl.rollout import ScoredRollout, concatenate, has_zero_std


def replace_groups(
    kept: ScoredRollout, fresh: ScoredRollout, flat: np.ndarray
) -> tuple[ScoredRollout, int]:
    """Replaces the groups `flat` by fresh groups of unequal rewards; also returns their number."""
    good = np.flatnonzero(~has_zero_std(fresh.rewards))
    source = np.arange(len(kept.rewards))
    source[flat[: len(good)]] = len(kept.rewards) + good
    both = ScoredRollout(
        concatenate([kept.rollout, fresh.rollout]),
        np.concatenate([kept.rewards, fresh.rewards]),
        np.concatenate([kept.by_function, fresh.by_function]),
        {
            name: np.concatenate([values, fresh.extras[name]])
            for name, values in kept.extras.items()
            if name in fresh.extras
        },
        kept.metrics,
    )
    return both.take(source), len(good)
