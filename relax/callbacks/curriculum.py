"""The pass rates of a run's prompts, for a curriculum, and their place in checkpoints."""

import numpy as np

from relax.data.curriculum import PassRateCurriculum
from relax.trainers.callback import Callback, Event


class CurriculumProgress(Callback):
    """Notes how many completions of each prompt passed, also of groups that were replaced.

    The loader reads the curriculum for its next item. Its state changes with the first update that
    is made of an item, so that an item whose rollout was interrupted is drawn again.

    Args:
      curriculum: that of the loader.
      rows: the rows of its prompts; the rows of other sets, such as held-out ones, are not noted.
      pass_reward: the lowest reward that counts as passed.
    """

    def __init__(self, curriculum: PassRateCurriculum, rows: list[dict], pass_reward: float):
        self.curriculum, self.pass_reward = curriculum, pass_reward
        self._rows = rows  # keeps the objects whose ids are noted
        self._places = {id(row): i for i, row in enumerate(rows)}
        self._pending: list[tuple[int, float]] = []

    def on_train_begin(self, event: Event) -> None:
        self._pending = []

    def on_scored(self, scored) -> None:
        # A completion without a reward counts as failed.
        passed = np.nan_to_num(scored.rewards, nan=-np.inf) >= self.pass_reward
        for row, share in zip(scored.rollout.rows, passed.mean(axis=1), strict=True):
            if id(row) in self._places:
                self._pending.append((self._places[id(row)], float(share)))

    def on_batch_end(self, event: Event) -> None:
        for prompt, share in self._pending:
            self.curriculum.update([prompt], [share])
        self._pending = []

    def state_dict(self) -> dict:
        return self.curriculum.state()

    def load_state_dict(self, state: dict) -> None:
        self.curriculum.restore(state)
