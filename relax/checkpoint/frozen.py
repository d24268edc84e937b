"""Checkpoints without the frozen weights, which can be had again: read from where they were read.

The checkpoints of an adapter are as small as the adapter. What they hold of the frozen weights is
a checksum of each: a run that goes on over other weights is refused.
"""

from pathlib import Path

from relax.checkpoint.checkpointer import Checkpointer
from relax.checkpoint.storage import leaf_crc, named_leaves
from relax.config.text import join_some
from relax.errors import CheckpointError

_KEY = "frozen"  # in the progress that is saved


class WithoutFrozen:
    """Saves states without `state.frozen`.

    Args:
      checkpointer: that saves them.
      frozen: the frozen weights of the run.
    """

    def __init__(self, checkpointer: Checkpointer, frozen):
        self.checkpointer = checkpointer
        self.checksums = {n: f"{leaf_crc(leaf):08x}" for n, leaf in named_leaves(frozen).items()}

    def save(self, step: int, state, progress: dict) -> Path:
        """As `Checkpointer.save`."""
        progress = progress | {_KEY: self.checksums}
        return self.checkpointer.save(step, state.replace(frozen={}), progress)

    def wait(self) -> None:
        """As `Checkpointer.wait`."""
        self.checkpointer.wait()

    def check(self, progress: dict) -> None:
        """Refuses to go on from a checkpoint of other frozen weights, by its progress."""
        before = progress.get(_KEY, {})
        changed = [n for n in before | self.checksums if before.get(n) != self.checksums.get(n)]
        if changed:
            raise CheckpointError(
                "a resumed run must have the frozen weights that it began with, and of "
                f"{len(self.checksums)} these are others now: {join_some(sorted(changed), 8)}. "
                "Restore the model that it was started from."
            )
