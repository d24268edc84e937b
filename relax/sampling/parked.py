"""Sequences that are left in free slots of a cache, whose first tokens need not be computed again.

When a chat goes on, its prompt begins with what the slot of its last answer holds already.
"""

from collections.abc import Collection

import numpy as np

LEAST = 8  # fewer tokens are not worth the place of another sequence


class Parked:
    """The tokens that free slots hold, the one parked longest ago first.

    Args:
      cuts: whether the first tokens of a sequence can be continued too, not only all of it. False
        for layers with a state that holds all tokens at once.
    """

    def __init__(self, cuts: bool):
        self.cuts = cuts
        self.ids: dict[int, np.ndarray] = {}
        self._prompts: dict[int, int] = {}
        self._since: dict[int, int] = {}
        self._time = 0

    def park(self, place: int, ids: np.ndarray, prompt: int) -> None:
        """Notes that a slot holds the columns of these tokens, the first `prompt` of a prompt."""
        self.drop(place)
        self.ids[place], self._prompts[place], self._since[place] = ids, prompt, self._time

    def drop(self, place: int) -> None:
        for kept in (self.ids, self._prompts, self._since):
            kept.pop(place, None)

    def match(self, prompt: np.ndarray) -> tuple[int, int] | None:
        """The slot to continue with a prompt, and how many of its tokens it holds; None: none.

        The prompt's last token is never among them, since it is decoded. A sequence of which less
        than half would be kept is left to its own conversation, unless only what was sampled would
        be lost, such as thoughts that a chat template drops.

        >>> parked = Parked(cuts=True)
        >>> parked.park(3, np.arange(20), 15)
        >>> parked.match(np.arange(30)), parked.match(np.arange(12)), parked.match(np.arange(8))
        ((3, 20), (3, 11), None)
        >>> parked.park(3, np.arange(40), 15)
        >>> parked.match(np.array([*range(14), 99, 99]))
        (3, 14)
        >>> parked.park(3, np.arange(40), 30)
        >>> parked.match(np.array([*range(14), 99, 99]))
        """
        found: tuple[int, int] | None = None
        for place, ids in self.ids.items():
            shorter = min(len(ids), len(prompt) - 1)
            differ = np.flatnonzero(ids[:shorter] != prompt[:shorter])
            count = int(differ[0]) if differ.size else shorter
            worth = count >= LEAST and count >= min(len(ids) / 2, self._prompts[place] - LEAST)
            if not worth or (count < len(ids) and not self.cuts):
                continue
            if found is None or count > found[1]:
                found = (place, count)
        return found

    def place(self, free: Collection[int]) -> int:
        """The free slot for a new sequence: an empty one, or the one parked longest ago."""
        self._time += 1
        empty = [place for place in free if place not in self.ids]
        return empty[0] if empty else next(place for place in self.ids if place in free)

    def longest(self, age: int) -> int:
        """Tokens of the longest sequence, without those since which `age` others were begun."""
        for place, since in list(self._since.items()):
            if self._time - since >= age:
                self.drop(place)
        return max((len(ids) for ids in self.ids.values()), default=0)
