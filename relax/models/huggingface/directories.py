"""Model directories: finding one, reading its files without leaving it, writing one whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from relax.config.text import join_some
from relax.errors import CONVERT_FIRST, ModelLoadError, RelaxError

MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt"}
JSON_BYTES = 50_000_000  # the longest indices of real models are a fifth of that


def find_directory(path: str | os.PathLike) -> Path:
    """A local directory as it is; a hub name downloaded where there is a network.

    Raises:
      ModelLoadError: there is no such directory; a GGUF file is named with the command that
        converts it.
    """
    name = str(path)
    directory = os.path.expanduser(name)
    if os.path.isdir(directory):
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
        files = [f"*{suffix}" for suffix in sorted(MODEL_FILES)]
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns="*/*"))
    except Exception as error:  # the hub client raises a dozen kinds, none of ours
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"'{name}' is no directory here and could not be fetched from the hub: {reason}"
        ) from error


def file_of(directory: Path, name: str) -> Path:
    """The path of a file of a model directory: a regular file, and no link that leads out of it.

    The hub's cache keeps the files of a snapshot in `blobs` folders, of the repository or of the
    whole cache, and links to them; that is not leaving it.
    """
    root = Path(os.path.realpath(directory))
    stores = [root]
    if root.parent.name == "snapshots":
        repository = root.parent.parent
        stores += [repository / "blobs", repository.parent / "blobs"]
    if name != os.path.basename(name):
        raise ModelLoadError(
            f"'{directory}': {join_some([name])} is not the plain name of a file in it."
        )
    try:
        target = Path(os.path.realpath(root / name))
        regular, there = target.is_file(), os.path.lexists(root / name)
    except (OSError, ValueError):  # a name too long, or with a zero byte
        raise ModelLoadError(f"'{directory}': no file can be named {join_some([name])}.") from None
    if not there:
        raise ModelLoadError(f"'{directory}' has no {name}.")
    if not any(target.is_relative_to(store) for store in stores):
        raise ModelLoadError(
            f"'{directory}': {name} is a link that leads out of the directory, to '{target}'. "
            "Copy the file instead."
        )
    if not regular:
        raise ModelLoadError(f"'{directory}': {name} is no regular file.")
    return target


def read_json(directory: Path, name: str) -> dict:
    """The object that a JSON file of a model directory holds."""
    file = file_of(directory, name)
    where = directory / name
    try:
        size = file.stat().st_size
        if size > JSON_BYTES:
            raise ModelLoadError(f"{where}: {size:,} bytes are too many; at most {JSON_BYTES:,}.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except ModelLoadError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: must hold an object, got {type(value).__name__}.")
    return value


def write_json(path: Path, value) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[tuple[Path, Path]]:
    """A directory that appears whole, when the context ends well, or not at all.

    Yields:
      Where to write the files, and where they will be: the absolute path.

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
    """What is at `path` will be deleted, so it must be a model and nothing else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RelaxError(f"'{path}' is a file; a model is saved as a directory. Choose another.")
    other = [f.name for f in path.iterdir() if f.suffix not in MODEL_FILES or f.is_dir()]
    if other:
        raise RelaxError(
            f"'{path}' holds more than a model, which saving would delete: "
            f"{join_some(sorted(other))}. Choose another directory, or move them away."
        )


def _replace(temporary: Path, path: Path) -> None:
    """Puts a finished directory in its place; what was there is out of the way until then."""
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
