"""Files that appear whole: written under a temporary name, flushed, then renamed."""

import json
import os
from pathlib import Path

STATE_FILE = "relax_state.json"  # in every checkpoint
TMP_SUFFIX = ".tmp"


def fsync_path(path: str | Path) -> None:
    """Asks the disk to keep a file's bytes, or a directory's entries, through a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: str | Path, data: bytes, *, sync: bool = True) -> None:
    """Writes a file whole: after any kill it is either the old one or the new one.

    Args:
      path: the file; its directory is made.
      data: all of its bytes.
      sync: wait until the disk has them, so that they survive a power loss as well.

    Raises:
      OSError: the file cannot be written; the old one is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One writer per directory, so a fixed name: what a killed run left is overwritten.
    temporary = path.with_name(path.name + TMP_SUFFIX)
    with open(temporary, "wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if sync:
        fsync_path(path.parent)


def write_json(path: str | Path, obj) -> None:
    """Writes `obj` as indented JSON, atomically. Floats keep every bit."""
    atomic_write(path, (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


def list_steps(directory: str | Path) -> list[int]:
    """The steps of the committed checkpoints in a directory, ascending, read from the disk."""
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
