"""Checkpoints without the frozen weights, which can be reloaded from their source.

Checkpoints of an adapter are as small as the adapter. They hold a checksum of each frozen weight,
so that resuming with other weights is an error.
"""

from pathlib import Path

from relax.checkpoint.checkpointer import Checkpointer
from relax.checkpoint.storage import leaf_crc, named_leaves
from relax.config.text import join_some
from relax.errors import ResumeError

_KEY = "frozen"  # key in the saved progress


class WithoutFrozen:
    """Saves states without `state.frozen`.

    Args:
      checkpointer: saves the states.
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
        """Checks that a checkpoint, given by its progress, has the same frozen weights."""
        before = progress.get(_KEY, {})
        changed = [n for n in before | self.checksums if before.get(n) != self.checksums.get(n)]
        if changed:
            raise ResumeError(
                "a resumed run must have the same frozen weights as before, but of "
                f"{len(self.checksums)} these have changed: {join_some(sorted(changed), 8)}. "
                "Restore the model that the run was started from."
            )
