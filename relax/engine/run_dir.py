"""The directory of a run: its lock, its files, and the checkpoint to resume from.

This module does not import jax.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from relax.config.text import join_some
from relax.errors import ConfigError
from relax.files import STATE_FILE, TMP_SUFFIX, list_steps

# Everything that a run writes, and that overwriting may delete.
RUN_FILES = (
    "config.json",
    "data.json",
    "metrics.jsonl",
    "status.json",
    "report.html",
    "bad_batch.jsonl",
)
RUN_FOLDERS = ("checkpoints", "best", "final", "samples", "completions", "events", "profile")

_LOCK = ".lock"
_LOCK_MARK = "ReLax run, pid "


class RunDir:
    """The output directory of one run.

    Call `lock()`, then `prepare(...)`, then write; `unlock()` at the end (or exit the context).

    Args:
      output_dir: the directory; created by `lock`.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir)
        self.checkpoints, self.best = self.path / "checkpoints", self.path / "best"
        self._lock_fd: int | None = None

    def __enter__(self) -> "RunDir":
        return self if self._lock_fd is not None else self.lock()

    def __exit__(self, *exc_info) -> None:
        self.unlock()

    def lock(self) -> "RunDir":
        """Creates and locks the directory. The lock is released even by kill -9.

        Raises:
          ConfigError: another live run holds it, it is not a run's, or it cannot be created.
        """
        if self._lock_fd is not None:
            return self
        self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"output_dir must be a writable directory, got '{self.path}': "
                f"{error.strerror}. Choose another --output_dir."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 100, 0).decode(errors="replace").removeprefix(_LOCK_MARK).strip()
            os.close(fd)
            raise ConfigError(
                f"output_dir can have only one live run, and '{self.path}' is locked by process "
                f"{holder or '(starting)'}. Wait for it, stop it, or choose another --output_dir."
            ) from None
        self._lock_fd = fd
        _sign(fd, _LOCK_MARK if self._is_run() else "")
        return self

    def unlock(self) -> None:
        """Releases the lock. The lock file stays: removing it would race with the next run."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def prepare(
        self,
        resume: str | Path | None = "never",
        overwrite: bool = False,
        say: Callable[[str], None] = print,
        *,
        clear: bool = True,
    ) -> Path | Literal["auto"] | None:
        """Finds the checkpoint to start from, and clears the directory if requested.

        Args:
          resume: 'never' (or None), 'auto', or the path of a checkpoint.
          overwrite: delete the files of an earlier run. Other files stay.
          say: prints one line about a decision or deletion.
          clear: False: the caller calls `clear` later, after all checks.

        Returns:
          None for a fresh start, 'auto' for the newest intact checkpoint here, or the checkpoint.

        Raises:
          ConfigError: the directory is not empty and no argument allows that; the path is not a
            checkpoint; or the arguments contradict each other.
        """
        if self._lock_fd is None:
            raise RuntimeError("RunDir.lock() must come before RunDir.prepare()")
        start = self._decide(resume, overwrite)
        if overwrite and clear:
            self.clear(say)
        _sign(self._lock_fd, _LOCK_MARK)
        return self._start(start, say)

    def look(
        self,
        resume: str | Path | None = "never",
        overwrite: bool = False,
        say: Callable[[str], None] = print,
    ) -> Path | Literal["auto"] | None:
        """The result of `lock` and `prepare`, without writing anything or taking the lock.

        Raises:
          ConfigError: as for `lock` and `prepare`.
        """
        self._refuse_foreign()
        existing = self.existing()
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ConfigError(
                f"output_dir must be a writable directory, got '{self.path}'. Choose "
                "another --output_dir."
            )
        return self._start(self._decide(resume, overwrite), say)

    def existing(self) -> Path:
        """The directory, or its nearest existing parent."""
        path = self.path.absolute()
        return next(place for place in (path, *path.parents) if os.path.lexists(place))

    def _decide(self, resume, overwrite: bool):
        """The checkpoint to start from; raises on contradictions and on a used directory."""
        resume = "never" if resume is None else resume
        if resume == "auto" and overwrite:
            raise ConfigError(
                "--resume auto and --overwrite_output_dir contradict each other: one resumes from "
                "the checkpoints that the other deletes. Pass one of them."
            )
        start = resume if resume in ("auto", "never") else self._checkpoint(Path(resume), overwrite)
        inside = isinstance(start, Path) and self._holds(start)
        if not overwrite and not inside and start != "auto":
            self._refuse_used()
        return start

    def _start(self, start, say: Callable[[str], None]):
        if start == "auto" and not list_steps(self.checkpoints):
            say(f"resume auto: no checkpoint in '{self.checkpoints}', starting from the beginning")
            return None
        return None if start == "never" else start

    def _holds(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def _checkpoint(self, path: Path, overwrite: bool) -> Path:
        """Checks that a path to resume from is a checkpoint that will not be deleted."""
        if not (path / STATE_FILE).is_file():
            found = [f"{path / 'checkpoints'}/{n}" for n in list_steps(path / "checkpoints")[-1:]]
            found += [str(path / str(n)) for n in list_steps(path)[-1:]]
            hint = f" Did you mean '{found[0]}'?" if found else " It looks like out/checkpoints/40."
            raise ConfigError(
                f"resume must be auto, never or the path of a checkpoint, got '{path}', which "
                f"holds no {STATE_FILE}.{hint}"
            )
        if overwrite and path.resolve().is_relative_to(self.path.resolve()):
            raise ConfigError(
                f"--overwrite_output_dir would delete '{path}', which --resume names. "
                "Remove one of them, or choose another --output_dir."
            )
        return path

    def _used(self) -> list[str]:
        """The directory's entries except the lock and half-written files."""
        if not self.path.is_dir():
            return []
        names = (name for name in os.listdir(self.path) if name != _LOCK)
        return sorted(name for name in names if not _is_half_written(name))

    def _is_run(self) -> bool:
        """Whether a ReLax run wrote here, shown by its lock file or a checkpoint."""
        try:
            with open(self.path / _LOCK, encoding="utf-8", errors="replace") as file:
                if file.read(len(_LOCK_MARK)) == _LOCK_MARK:
                    return True
        except OSError:
            pass
        steps = list_steps(self.checkpoints)
        return any((self.checkpoints / str(step) / STATE_FILE).is_file() for step in steps)

    def _refuse_foreign(self) -> None:
        """Raises an error if another program's files have the names of ours.

        A Hugging Face model directory has a config.json too, which must not be overwritten.
        """
        if self._is_run():
            return
        clash = [name for name in self._used() if name in RUN_FILES + RUN_FOLDERS]
        if clash:
            raise ConfigError(
                f"output_dir must not hold files of another program, but '{self.path}' holds "
                f"{', '.join(clash)}, not written by ReLax. Choose another --output_dir."
            )

    def _refuse_used(self) -> None:
        used = self._used()
        if not used:
            return
        steps = list_steps(self.checkpoints)
        if not any(name in RUN_FILES + RUN_FOLDERS for name in used):
            raise ConfigError(
                f"output_dir must be empty, but '{self.path}' holds {join_some(used, 3)}. Pass "
                "--overwrite_output_dir to write there too, or choose another --output_dir."
            )
        last = f"from step {steps[-1]}" if steps else "from the beginning: nothing was saved"
        raise ConfigError(
            f"output_dir must be empty, but '{self.path}' holds another run. Pass --resume auto "
            f"to resume it ({last}), --overwrite_output_dir to delete it, or choose another "
            "--output_dir."
        )

    def clear(self, say: Callable[[str], None] = print) -> None:
        """Deletes ReLax's files by name; checkpoints last, since they are the most valuable."""
        ours = [n for n in os.listdir(self.path) if n in RUN_FILES or _is_half_written(n)]
        folders = [n for n in reversed(RUN_FOLDERS) if os.path.lexists(self.path / n)]
        for name in ours + folders:
            entry = self.path / name
            if stat.S_ISDIR(entry.lstat().st_mode):
                shutil.rmtree(entry)
            else:
                entry.unlink()  # removes a link, not its target
        if ours or folders:
            say(f"overwrite: deleted {', '.join(ours + folders)} in '{self.path}'")


def _is_half_written(name: str) -> bool:
    return name.endswith(TMP_SUFFIX) and name.removesuffix(TMP_SUFFIX) in RUN_FILES


def _sign(fd: int, mark: str) -> None:
    """Writes the process that holds the lock; the mark identifies a run's directory."""
    text = f"{mark}{os.getpid()}\n".encode()
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))
