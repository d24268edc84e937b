"""Checkpoints: committed by one rename, verified bit by bit when read.

A checkpoint is a directory named after its step:

    <step>/arrays/...         the leaves of the state, as tensorstore writes them
    <step>/relax_state.json   format, step, progress, fingerprint
    <step>/checksums.json     crc32 of every leaf and of every file, its own included

It is written under a temporary name and renamed when all of it is on disk, so a directory named
after a step is complete. Tensorstore does not detect every flipped bit; the checksums do. Nothing
in a checkpoint is ever unpickled.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from relax.checkpoint.storage import (
    DamagedError,
    Snapshot,
    check_structure,
    damaged_leaves,
    fingerprint,
    fingerprint_diff,
    named_leaves,
    place,
    read_leaves,
    read_manifests,
    snapshot,
    tree_bytes,
    where,
    write,
)
from relax.config.text import format_bytes, join_some
from relax.errors import CheckpointError, ConfigError, ResumeError
from relax.files import file_crc, fsync_path, list_steps
from relax.parallel import processes

__all__ = [
    "Checkpointer",
    "check_space",
    "fingerprint",
    "fingerprint_diff",
    "full_disk",
    "named_leaves",
    "read_info",
    "restore_checkpoint",
    "tree_bytes",
]

# Names of directories that are not yet, or no longer, checkpoints.
_TMP = re.compile(r"tmp-(\d+)(-removed|-replaced)?")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_FULL_WORDS = ("No space left", "File too large", "Disk quota", "RESOURCE_EXHAUSTED")


class Checkpointer:
    """Saves and restores states in one directory, with one writer and any number of readers.

    Args:
      directory: directory of the checkpoints, created at the first save.
      save_total_limit: number of checkpoints to keep (>= 1); None: all.
      asynchronous: `save` returns once the state is copied to the host, and a thread writes it; the
        next `save`, or `wait`, waits for it and raises its error.
      warn: called about damaged, removed or differing checkpoints; default `warnings.warn`.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> checkpointer = Checkpointer(tempfile.mkdtemp())
      >>> _ = checkpointer.save(3, {"w": jnp.ones(2)}, {"epoch": 0})
      >>> checkpointer.steps()
      [3]
      >>> state, progress, step = checkpointer.restore({"w": jnp.zeros(2)})
      >>> state["w"].tolist(), progress, step
      ([1.0, 1.0], {'epoch': 0}, 3)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        save_total_limit: int | None = None,
        asynchronous: bool = False,
        warn: Callable[[str], None] | None = None,
    ):
        if save_total_limit is not None and save_total_limit < 1:
            raise CheckpointError(
                f"save_total_limit must be at least 1, got {save_total_limit}. "
                "Leave it out to keep every checkpoint."
            )
        self.directory = Path(directory).absolute()
        self.save_total_limit = save_total_limit
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._written: Future | None = None
        self._warn = warn or (lambda line: warnings.warn(line, stacklevel=3))

    def steps(self) -> list[int]:
        """The committed steps, ascending, read from the disk each time."""
        return list_steps(self.directory)

    def path(self, step: int | str) -> Path:
        """The directory of a step's checkpoint, existing or not."""
        return self.directory / str(step)

    def sweep(self) -> None:
        """Cleans up after a killed run. Only the writer may call it; `save` does it too."""
        for entry in self.directory.glob("tmp-*"):
            match = _TMP.fullmatch(entry.name)
            if match and match[2] == "-replaced" and not self.path(match[1]).exists():
                os.rename(entry, self.path(match[1]))
            elif match:
                shutil.rmtree(entry)

    def save(self, step: int, state, progress: dict) -> Path:
        """Writes a checkpoint; unless asynchronous, it is committed when this returns.

        Checkpoints of later steps, left by a run that was resumed earlier, are removed just before
        the new one is committed; one of the same step is replaced.

        Args:
          step: optimizer updates done (>= 0).
          state: any pytree of arrays, numbers and typed keys. It may be donated after this.
          progress: JSON values (tuples are restored as lists, keys as strings).

        Raises:
          CheckpointError: it, or the one before it, could not be written. Earlier checkpoints are
            intact.
        """
        if step < 0:
            raise CheckpointError(f"the step of a checkpoint must be 0 or more, got {step}")
        self.wait()
        taken = snapshot(step, state, progress, copied=self._writer is not None)
        if self._writer is None:
            self._write(taken)
        else:
            self._written = self._writer.submit(self._write, taken)
        return self.path(step)

    def wait(self) -> None:
        """Waits until all saves are committed.

        Raises:
          CheckpointError: it could not be written.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _write(self, taken: Snapshot) -> None:
        temporary = self.directory / f"tmp-{taken.step}"
        try:
            if processes.is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
                self.sweep()
            write(temporary, taken)
            if processes.is_main():
                self._remove_later(taken.step)
                self._commit(temporary, taken.step)
        except BaseException as error:
            if processes.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(self._why_not_written(taken, error)) from error
        if processes.is_main():
            self._keep_newest()
        processes.barrier(f"{where(temporary)}: saved")

    def restore(self, template, step: int | None = None) -> tuple[Any, dict, int]:
        """Reads a checkpoint back after verifying every bit of it.

        Args:
          template: a state, or the `jax.ShapeDtypeStruct`s of one: structure, shapes, dtypes and,
            if it has jax arrays or shardings, the placement of the leaves.
          step: the step to read; None: the newest intact one, with a warning about damaged ones.

        Returns:
          `(state, progress, step)`.

        Raises:
          ResumeError: no intact checkpoint, or its leaves differ from the template's.
        """
        if step is not None:
            return restore_checkpoint(self.path(step), template, warn=self._warn)
        found = self.steps()
        for candidate in reversed(found):
            try:
                return restore_checkpoint(self.path(candidate), template, warn=self._warn)
            except DamagedError as damage:
                self._warn(f"{damage} Trying an older one.")
        raise ResumeError(
            f"no intact checkpoint in '{self.directory}' (checked: {found or 'none'}). Start a "
            "new run."
        )

    def _remove_later(self, step: int) -> None:
        """Removes later steps, the last first, so that a kill leaves no gap."""
        later = [old for old in self.steps() if old > step]
        for old in reversed(later):
            self._remove(old)
        if later:
            self._warn(f"saving step {step}: removed {later}, of a run that had continued further")

    def _commit(self, temporary: Path, step: int) -> None:
        """Renames a finished checkpoint; `sweep` undoes an interrupted replacement."""
        replaced = self.directory / f"tmp-{step}-replaced"
        if self.path(step).exists():
            os.rename(self.path(step), replaced)
        os.rename(temporary, self.path(step))
        fsync_path(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _keep_newest(self) -> None:
        if self.save_total_limit is not None:
            for old in self.steps()[: -self.save_total_limit]:
                self._remove(old)

    def _remove(self, step: int) -> None:
        # Rename first: a kill must not leave a partial checkpoint under a step's name.
        removed = self.directory / f"tmp-{step}-removed"
        os.rename(self.path(step), removed)
        shutil.rmtree(removed)

    def _why_not_written(self, taken: Snapshot, error: Exception) -> str:
        step, previous = taken.step, self.steps()
        kept = f"checkpoint {previous[-1]} is intact" if previous else "there is no earlier one"
        said = full_disk(error)
        if said is None:
            reason = str(error).strip().split("\n")[0][:300]
            return f"checkpoint {step} could not be written to '{self.directory}': {reason}; {kept}"
        need, free = tree_bytes(taken.arrays), shutil.disk_usage(_existing(self.directory)).free
        return (
            f"checkpoint {step} does not fit on the disk: it needs about {format_bytes(need)}, "
            f"'{self.directory}' has {format_bytes(free)} free ({said}); {kept}. "
            "Free some space, or lower save_total_limit."
        )


def restore_checkpoint(
    path: str | Path, template, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[Any, dict, int]:
    """Reads the checkpoint at `path`; see `Checkpointer.restore`."""
    path = Path(path).absolute()
    if not path.is_dir():
        there = list_steps(path.parent)
        raise ResumeError(f"there is no checkpoint '{path}'. Saved steps: {there or 'none'}.")
    sums, info = read_manifests(path)
    want = named_leaves(template)
    check_structure(path, want, sums["leaves"])
    bad_files = [name for name, crc in sums["files"].items() if file_crc(path / name) != crc]
    if bad_files:
        what = [f"file {name}" for name in bad_files]
        what += [f"leaf {name}" for name in damaged_leaves(path, sums["leaves"])]
        raise DamagedError(f"checkpoint '{path}' is damaged: {join_some(what, 8)}.")
    changed = fingerprint_diff(info["fingerprint"], fingerprint())
    if changed:
        warn(f"bit-identity with the run that saved step {info['step']} is not promised: {changed}")
    # One leaf after another is read and placed: two copies of the state never exist at once.
    read = read_leaves(path, {name: sums["leaves"][name] for name in want})
    leaves = zip(want.items(), read, strict=True)
    placed = [_placed(path, name, array, like) for (name, like), array in leaves]
    state = jax.tree.unflatten(jax.tree.structure(template), placed)
    return state, info["progress"], info["step"]


def _placed(path: Path, name: str, array, like):
    if array is None:
        raise DamagedError(f"checkpoint '{path}' is damaged: leaf {name}.")
    return place(array, like)


def read_info(path: str | Path) -> dict:
    """The verified relax_state.json of a checkpoint: format, step, progress, fingerprint."""
    return read_manifests(Path(path))[1]


def full_disk(error: Exception) -> str | None:
    """The part of an error message that indicates a full disk, from any library, or None.

    >>> full_disk(OSError(errno.ENOSPC, "No space left on device")), full_disk(OSError("moved"))
    ('No space left', None)
    """
    said = [words for words in _FULL_WORDS if words in str(error)]
    if said:
        return said[0]
    return str(error) if getattr(error, "errno", None) in _FULL else None


def check_space(directory: str | Path, nbytes: int, copies: int, others: int = 0) -> None:
    """Checks that the checkpoints of a run will fit on the disk.

    Args:
      directory: their directory, which may not exist yet.
      nbytes: size of one checkpoint, from `tree_bytes`.
      copies: number that will exist at once, besides existing ones.
      others: bytes of the model directory that will be written too.

    Raises:
      ConfigError: there is not enough space.
    """
    free = shutil.disk_usage(_existing(Path(directory).absolute())).free
    need = nbytes * copies + others
    if free < need:
        what = [f"{copies} checkpoints of {format_bytes(nbytes)}"] if copies else []
        what += [f"a model of {format_bytes(others)}"] if others else []
        raise ConfigError(
            f"{' and '.join(what)} need {format_bytes(need)}, and '{directory}' has "
            f"{format_bytes(free)} free. Free some space, lower save_total_limit, "
            "or choose another output_dir."
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
