"""Reads GGUF files: metadata, and tensors, dequantised one at a time.

The layout (little-endian): "GGUF", version, number of tensors, number of metadata entries; the
entries; name, shape, type and offset of each tensor; the tensors, aligned. The `gguf` package reads
one entry of an array at a time, which takes 16 s for the vocabulary of Gemma 3, and does not detect
truncated files; only its tensor types are used.

Source: ggml authors, GGUF specification (ggml/docs/gguf.md), 2023.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relax.errors import ModelLoadError

MAGIC, VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The place of a tensor: numpy shape, number of its type, offset and bytes per row."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    row_bytes: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file: `metadata` by key, `tensors` by name."""

    path: Path
    data: mmap.mmap
    metadata: Mapping
    tensors: Mapping[str, Tensor]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A dequantised float32 tensor, or the part at `index` of its first axis."""
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        data = np.frombuffer(self.data, np.uint8, tensor.end - tensor.offset, tensor.offset)
        data = data.reshape(*tensor.shape[:-1], tensor.row_bytes)
        try:
            values = gguf.dequantize(data if index is None else data[index], kind)
        except (NotImplementedError, ValueError) as error:
            raise ModelLoadError(
                f"{self.path}: {name} is of type {kind.name}, which the gguf package cannot "
                f"dequantise: {error}. Take a file in another quantisation, such as Q8_0."
            ) from error
        return np.asarray(values, np.float32)


def read_gguf(path) -> GGUFFile:
    """Opens a file and reads all but the tensors.

    Raises:
      ModelLoadError: it is no GGUF file, is truncated, or the gguf package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelLoadError(
            f"reading {path} needs the gguf package: pip install 'relax-trainers[gguf]'."
        ) from error
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise ModelLoadError(
                    f"{path}: no GGUF file: it must begin with {MAGIC!r}, got {start!r}."
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelLoadError(f"cannot read the model {path}: {error.strerror}.") from error
    try:
        metadata, tensors = _read_header(_Cursor(data, len(MAGIC)), gguf)
    except (struct.error, ValueError, OverflowError, _Damaged) as error:
        raise ModelLoadError(
            f"{path}: not readable as a GGUF file: {error}. Download or convert it again."
        ) from error
    return GGUFFile(path, data, metadata, tensors)


class _Damaged(Exception):
    """A fault of a file; the message lacks the file name."""


@dataclasses.dataclass
class _Cursor:
    """A position in a file that advances as values are read."""

    data: mmap.mmap
    at: int

    def scalars(self, code: str, count: int) -> list:
        begin = self.skip(struct.calcsize("<" + code) * count)
        return np.frombuffer(self.data, "<" + code, count, begin).tolist()

    def scalar(self, code: str):
        return self.scalars(code, 1)[0]

    def strings(self, count: int) -> list[str]:
        # A vocabulary has 250,000 entries, too many for a call each.
        at, found, length = self.at, [], struct.Struct("<Q")
        for _ in range(count):
            begin = at + length.size
            at = begin + length.unpack_from(self.data, at)[0]
            found.append(self.data[begin:at])
        self.skip(at - self.at)
        return [text.decode("utf-8") for text in found]

    def skip(self, size: int) -> int:
        """Advances by `size` bytes and returns the position before."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise _Damaged(f"it ends at byte {len(self.data):,} and should reach {self.at:,}")
        return begin

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.strings(1)[0]
        if kind != _ARRAY:
            raise _Damaged(f"metadata of the unknown type {kind} at byte {self.at:,}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind], count)
        if kind != _STRING:
            raise _Damaged(f"an array of the unknown type {kind} at byte {self.at:,}")
        return self.strings(count)


def _read_header(cursor: _Cursor, gguf) -> tuple[dict, dict[str, Tensor]]:
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise _Damaged(f"its version is {version}, and only {VERSIONS} are known")
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(entry_count):
        key = cursor.strings(1)[0]
        if key in metadata:
            raise _Damaged(f"two entries named {key!r}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    found = []
    for _ in range(tensor_count):
        name = cursor.strings(1)[0]
        rank = cursor.scalar("I")
        if not 0 < rank <= 4:
            raise _Damaged(f"{name!r} has {rank} axes")
        shape = tuple(cursor.scalars("Q", rank)[::-1])
        found.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _Damaged(f"general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise _Damaged(f"two tensors named {name!r}")
        tensors[name] = tensor = Tensor(
            shape, kind, base + offset, _row_bytes(name, shape, kind, gguf)
        )
        if tensor.end > len(cursor.data):
            raise _Damaged(
                f"it ends at byte {len(cursor.data):,} and {name!r} should reach {tensor.end:,}"
            )
    return metadata, tensors


def _row_bytes(name: str, shape: tuple[int, ...], kind: int, gguf) -> int:
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Damaged(
            f"{name!r} is of type {kind}, which the gguf package does not know"
        ) from None
    if shape[-1] % block:
        raise _Damaged(f"{name!r} has rows of {shape[-1]} in blocks of {block}")
    return shape[-1] // block * size
