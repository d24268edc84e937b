"""Atomic writing of files, and safe reading of files in downloaded directories.

A downloaded directory may contain anything. Only regular files within it, of limited size, are
read; `check_directory` checks all of them before a library opens one.
"""

import json
import os
import zlib
from pathlib import Path

from relax.errors import ModelLoadError

STATE_FILE = "relax_state.json"  # part of every checkpoint
TMP_SUFFIX = ".tmp"

# Limits on files of a model directory; docs/models.md has the table.
JSON_BYTES = 50_000_000  # configurations and indices; the longest real index is a fifth of that
JSON_DEPTH = 64  # nesting of objects and lists
TOKENIZER_BYTES = 200_000_000  # each file of a tokenizer; the largest real ones have 35 MB
TEMPLATE_BYTES = 1_000_000  # a chat template; the longest real ones have 20 kB
MODEL_FILES = {
    ".json": TOKENIZER_BYTES,
    ".txt": TOKENIZER_BYTES,
    ".model": TOKENIZER_BYTES,
    ".jinja": TEMPLATE_BYTES,
    ".safetensors": None,  # its header is checked against config.json
}
CARD, CURVES = "README.md", "training_curves.svg"  # the model card, and the picture in it
CARD_MARK = "<!-- Written by ReLax; replaced with the model beside it. -->"
TEMPLATES = "additional_chat_templates"  # a folder that transformers also reads


def fsync_path(path: str | Path) -> None:
    """Flushes a file's bytes, or a directory's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_crc(path: Path) -> int | None:
    """crc32 of a file's bytes; None if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return crc


def content_digest(path: str | Path) -> str:
    """Checksum of a file, or of the names and contents of all files in a directory."""
    path, crc = Path(path), 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            name = "" if file == path else file.relative_to(path)
            crc = zlib.crc32(f"{name}:{file_crc(file)}\n".encode(), crc)
    return f"{crc:08x}"


def atomic_write(path: str | Path, data: bytes, *, sync: bool = True) -> None:
    """Writes a file atomically: after a kill it has either the old or the new contents.

    Args:
      path: path of the file; its directory is created.
      data: contents.
      sync: wait until the contents are on disk, so that they survive a power loss.

    Raises:
      OSError: the file cannot be written; the old one is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # There is one writer per directory, so a fixed name overwrites a killed run's leftovers.
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
    """Steps of the committed checkpoints in a directory, ascending."""
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def check_directory(directory: str | os.PathLike) -> None:
    """Refuses a model directory with a file that is unsafe for a library to read.

    Raises:
      ModelLoadError: a link leads out of the directory, or a file is irregular or too large.
    """
    directory = Path(directory)
    for name in sorted(os.listdir(directory)):
        if Path(name).suffix in MODEL_FILES:
            file_of(directory, name)
    if os.path.lexists(directory / TEMPLATES):
        inside(directory, TEMPLATES)
        for name in sorted(os.listdir(directory / TEMPLATES)):
            file_of(directory / TEMPLATES, name)


def inside(directory: Path, name: str) -> Path:
    """The resolved path of a directory's entry, in it or in the hub's cache.

    The hub's cache stores the files of a snapshot in `blobs` folders, of the repository or of the
    whole cache, and links to them; such links are allowed.

    Raises:
      ModelLoadError: a link leads elsewhere.
      OSError, ValueError: the name is invalid.
    """
    root = Path(os.path.realpath(directory))
    stores = [root]
    snapshot = root.parent if root.name == TEMPLATES else root
    if snapshot.parent.name == "snapshots":
        repository = snapshot.parent.parent
        stores += [repository / "blobs", repository.parent / "blobs"]
    target = Path(os.path.realpath(root / name))
    if not any(target.is_relative_to(store) for store in stores):
        raise ModelLoadError(
            f"'{directory}': {name} is a link that leads out of the directory, to '{target}'. "
            "Copy the file instead."
        )
    return target


def file_of(directory: Path, name: str) -> Path:
    """The path of a regular file of limited size in a model directory.

    Raises:
      ModelLoadError: there is no such file.
    """
    shown = name if name.isprintable() and 0 < len(name) < 200 else f"{name[:200]!r}"
    if name != os.path.basename(name):
        raise ModelLoadError(f"'{directory}': {shown} is not the plain name of a file in it.")
    try:
        target = inside(directory, name)
        regular, there = target.is_file(), os.path.lexists(directory / name)
    except ModelLoadError:
        raise
    except (OSError, ValueError):  # a name that is too long or contains a zero byte
        raise ModelLoadError(f"'{directory}': no file can be named {shown}.") from None
    if not there:
        raise ModelLoadError(f"'{directory}' has no {name}.")
    if not regular:
        raise ModelLoadError(f"'{directory}': {name} is no regular file.")
    check_size(directory / name, MODEL_FILES.get(Path(name).suffix))
    return target


def check_size(file: Path, most: int | None) -> None:
    """Refuses a file above a number of bytes.

    Raises:
      ModelLoadError: the file is larger; names both numbers.
    """
    size = file.stat().st_size
    if most is not None and size > most:
        raise ModelLoadError(f"{file}: {size:,} bytes are too many; at most {most:,}.")


def json_object(text: str | bytes) -> dict:
    """The object in a JSON text.

    Raises:
      ValueError: the text is no JSON, is nested too deeply, or holds no object; says which.
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("not readable as JSON: lists are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must hold an object, got {type(value).__name__}")
    return value


def read_json(directory: Path, name: str) -> dict:
    """Reads the object in a JSON file of a model directory.

    Raises:
      ModelLoadError: the file is missing, too large or too deeply nested, or has no object.
    """
    file = file_of(directory, name)
    where = directory / name
    check_size(where, JSON_BYTES)
    try:
        value = json_object(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{where}: {error}.") from error
    if json_depth(value) > JSON_DEPTH:
        raise ModelLoadError(f"{where}: objects and lists are nested more than {JSON_DEPTH} deep.")
    return value


def json_depth(value) -> int:
    """Nesting depth of objects and lists.

    >>> json_depth({"a": [1, {}]}), json_depth(1)
    (3, 0)
    """
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth
