"""Which prompts come next, by how often the policy solves them.

Every prompt has a due time, and the prompts that are due first come next. A prompt that was passed
in a share r of its completions comes again after

    1 / max(4 r (1 - r), floor)

rounds: after one where half of the completions pass, after 1 / floor where all or none do. There
groups of equal rewards have no gradient. This is stride scheduling (Waldspurger and Weihl, 1995,
MIT/LCS/TM-528), with the weight of a prompt as its tickets.
"""

from collections.abc import Sequence

import numpy as np

from relax.data.order import epoch_order
from relax.errors import ConfigError


class PassRateCurriculum:
    """The due times and pass rates of prompts.

    r is the mean of the share in the last group of completions and of r before it; for the first
    group it is that share. Prompts without a group are due at 0, before all others.

    Args:
      count: number of prompts.
      floor: the least weight of a prompt, in (0, 1].

    Attributes:
      due: `[count]` float64, the due time of each prompt.
      rates: `[count]` float64, r of each prompt; NaN before its first group.

    >>> curriculum = PassRateCurriculum(3, floor=0.25)
    >>> curriculum.update([0, 1, 2], [0.5, 1.0, 0.0])
    >>> curriculum.due.tolist()
    [1.0, 4.0, 4.0]
    """

    def __init__(self, count: int, floor: float = 0.1):
        if not 0 < floor <= 1:
            raise ConfigError(f"curriculum_floor must be above 0 and at most 1, got {floor}.")
        self.floor = floor
        self.due = np.zeros(count)
        self.rates = np.full(count, np.nan)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """All prompts, those that are due first in front; equals in the order of the epoch."""
        count = len(self.due)
        equals = epoch_order(count, seed, epoch) if shuffle else np.arange(count)
        return equals[np.argsort(self.due[equals], kind="stable")]

    def update(self, prompts: Sequence[int], shares: Sequence[float]) -> None:
        """Notes the shares of completions that passed, one group after the other."""
        for prompt, share in zip(prompts, shares, strict=True):
            before = self.rates[prompt]
            rate = share if np.isnan(before) else (share + before) / 2
            self.rates[prompt] = rate
            self.due[prompt] += 1 / max(4 * rate * (1 - rate), self.floor)

    def state(self) -> dict[str, list]:
        """The prompts that have a rate, as JSON types, which give back the same numbers."""
        seen = np.flatnonzero(~np.isnan(self.rates))
        return {
            "prompts": seen.tolist(),
            "due": self.due[seen].tolist(),
            "rates": self.rates[seen].tolist(),
        }

    def restore(self, state: dict[str, list]) -> None:
        """Restores what `state` returned."""
        self.due[:], self.rates[:] = 0.0, np.nan
        self.due[state["prompts"]] = state["due"]
        self.rates[state["prompts"]] = state["rates"]
