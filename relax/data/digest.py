"""Digests of files and values, which name what is made of them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

_BLOCK = 2**22  # bytes per read of a file


def files_key(paths: Sequence[Path], *others: object) -> str:
    """A digest of the contents of files, in their order, and of other values."""
    return digest_of([[(path.suffix, file_digest(path)) for path in paths], others])


def file_digest(path: Path) -> str:
    """The digest of a file, read in blocks: a map of it would count as memory of this process."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value) -> str:
    """The digest of a value of JSON types; of others by their `repr`."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
