"""Model directories: finding one, and writing one whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from relax.config.text import join_some
from relax.errors import CONVERT_FIRST, ModelLoadError, RelaxError
from relax.files import CARD, CARD_MARK, CURVES, MODEL_FILES, check_directory


def find_directory(path: str | os.PathLike) -> Path:
    """Resolves a local directory, or downloads a hub name.

    Raises:
      ModelLoadError: there is no such directory, or a file in it must not be read (see
        `relax.files.check_directory`); for a GGUF file it names the command that converts it.
    """
    name = str(path)
    directory = os.path.expanduser(name)
    if os.path.isdir(directory):
        check_directory(directory)
        return Path(directory)
    if name.lower().endswith(".gguf"):
        raise ModelLoadError(CONVERT_FIRST.format(path=name))
    if os.path.lexists(directory) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelLoadError(
            f"no model directory at '{name}'. Give a directory with config.json and "
            "model.safetensors, or a hub name such as owner/model."
        )
    from huggingface_hub import snapshot_download

    try:
        files = [CARD, *(f"*{suffix}" for suffix in sorted(MODEL_FILES))]
        found = Path(snapshot_download(name, allow_patterns=files, ignore_patterns="*/*"))
    except Exception as error:  # the hub client raises a dozen kinds, none of ours
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"'{name}' is no directory here and could not be fetched from the hub: {reason}"
        ) from error
    check_directory(found)
    return found


def write_json(path: Path, value) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[tuple[Path, Path]]:
    """Context for writing a directory, which appears only if the context succeeds.

    Yields:
      The directory to write to, and the final absolute path.

    Raises:
      RelaxError: `path` is a file, or a directory with more in it than a model.
    """
    path = Path(path).expanduser().resolve()
    _check_replaceable(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary, path
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    """Checks that `path` holds nothing but a model, since it will be deleted."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RelaxError(f"'{path}' is a file; a model is saved as a directory. Choose another.")
    card = (CARD, CURVES) if _is_own_card(path / CARD) else ()
    other = [
        f.name
        for f in path.iterdir()
        if (f.suffix not in MODEL_FILES and f.name not in card) or f.is_dir()
    ]
    if other:
        raise RelaxError(
            f"'{path}' holds more than a model, which saving would delete: "
            f"{join_some(sorted(other))}. Choose another directory, or move them away."
        )


def _is_own_card(file: Path) -> bool:
    """Whether a model card is one that a run wrote, and may be replaced with its model."""
    return file.is_file() and CARD_MARK in file.read_text("utf-8", "replace")


def _replace(temporary: Path, path: Path) -> None:
    """Moves a finished directory to its final path, replacing an existing one."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
