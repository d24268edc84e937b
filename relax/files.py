"""Files: written whole, and read from downloaded directories without leaving them, within limits.

A directory that somebody else made may hold anything. Whatever is read of it is a regular file
inside, of a bounded size; `check_directory` looks at all of them before a library opens one.
"""

import json
import os
import zlib
from pathlib import Path

from relax.errors import ModelLoadError

STATE_FILE = "relax_state.json"  # in every checkpoint
TMP_SUFFIX = ".tmp"

# Limits of what is read from a model directory (the table is in docs/models.md).
JSON_BYTES = 50_000_000  # configurations and indices; the longest real index is a fifth of that
JSON_DEPTH = 64  # objects and lists within each other
TOKENIZER_BYTES = 200_000_000  # each file of a tokenizer; the largest real ones have 35 MB
TEMPLATE_BYTES = 1_000_000  # a chat template; the longest real ones have 20 kB
MODEL_FILES = {
    ".json": TOKENIZER_BYTES,
    ".txt": TOKENIZER_BYTES,
    ".model": TOKENIZER_BYTES,
    ".jinja": TEMPLATE_BYTES,
    ".safetensors": None,  # as large as config.json says, which is checked against its header
}
TEMPLATES = "additional_chat_templates"  # a folder that transformers reads, too


def fsync_path(path: str | Path) -> None:
    """Asks the disk to keep a file's bytes, or a directory's entries, through a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_crc(path: Path) -> int | None:
    """crc32 of a file's bytes, None if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return crc


def content_digest(path: str | Path) -> str:
    """A checksum of the bytes of a file, or of all files in a directory and their names."""
    path, crc = Path(path), 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            name = "" if file == path else file.relative_to(path)
            crc = zlib.crc32(f"{name}:{file_crc(file)}\n".encode(), crc)
    return f"{crc:08x}"


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


def check_directory(directory: str | os.PathLike) -> None:
    """Refuses a model directory in which some file that a library might read is not fit for it.

    Raises:
      ModelLoadError: a link leads out of the directory, a file is no regular one, or too large.
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
    """Where an entry of a directory is: there, or where the hub's cache keeps it.

    The hub's cache keeps the files of a snapshot in `blobs` folders, of the repository or of the
    whole cache, and links to them; that is not leaving it.

    Raises:
      ModelLoadError: a link leads elsewhere.
      OSError, ValueError: nothing can have this name.
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
    """The path of a file of a model directory: a regular file in it, and not too large.

    Raises:
      ModelLoadError: it is not there, or not such a file.
    """
    shown = name if name.isprintable() and 0 < len(name) < 200 else f"{name[:200]!r}"
    if name != os.path.basename(name):
        raise ModelLoadError(f"'{directory}': {shown} is not the plain name of a file in it.")
    try:
        target = inside(directory, name)
        regular, there = target.is_file(), os.path.lexists(directory / name)
    except ModelLoadError:
        raise
    except (OSError, ValueError):  # a name too long, or with a zero byte
        raise ModelLoadError(f"'{directory}': no file can be named {shown}.") from None
    if not there:
        raise ModelLoadError(f"'{directory}' has no {name}.")
    if not regular:
        raise ModelLoadError(f"'{directory}': {name} is no regular file.")
    check_size(directory / name, MODEL_FILES.get(Path(name).suffix))
    return target


def check_size(file: Path, most: int | None) -> None:
    """Refuses a file of more than so many bytes.

    Raises:
      ModelLoadError: with both numbers.
    """
    size = file.stat().st_size
    if most is not None and size > most:
        raise ModelLoadError(f"{file}: {size:,} bytes are too many; at most {most:,}.")


def read_json(directory: Path, name: str) -> dict:
    """The object that a JSON file of a model directory holds.

    Raises:
      ModelLoadError: there is no such file, it is too large or too deep, or holds no object.
    """
    file = file_of(directory, name)
    where = directory / name
    check_size(where, JSON_BYTES)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: must hold an object, got {type(value).__name__}.")
    if json_depth(value) > JSON_DEPTH:
        raise ModelLoadError(f"{where}: objects and lists are nested more than {JSON_DEPTH} deep.")
    return value


def json_depth(value) -> int:
    """How deep objects and lists are nested.

    >>> json_depth({"a": [1, {}]}), json_depth(1)
    (3, 0)
    """
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth
