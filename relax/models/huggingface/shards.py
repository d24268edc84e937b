"""The safetensors files of a model directory: one, or several with an index."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.files import file_of, read_json
from relax.models.huggingface import mxfp4
from relax.models.huggingface.directories import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # a shard is larger only where one tensor is
DTYPES = {"F32", "F16", "BF16", "F64"}
# numpy's name of a dtype -> that of a file.
_CODES = {f"float{n}": f"F{n}" for n in (16, 32, 64)} | {"bfloat16": "BF16", "bool": "BOOL"}
_CODES |= {
    f"{kind}{n}": f"{kind[0].upper()}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)
}

Kind = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor


def tensor_files(directory: Path, ignored: str) -> dict[str, str]:
    """Tensor name -> shard file, from the index or from the single file.

    Args:
      directory: the model's directory.
      ignored: names that end so are left out.
    """
    single, index = (os.path.lexists(directory / name) for name in (SINGLE, INDEX))
    if not single and not index:
        raise ModelLoadError(
            f"'{directory}' has neither {SINGLE} nor {INDEX}. Other formats are not read: save the "
            "model with transformers' save_pretrained."
        )
    if not index:
        return _names(directory, SINGLE, ignored)
    files = read_json(directory, INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelLoadError(f"{directory / INDEX}: no weight_map of tensor names to files.")
    shards = sorted(set(files.values()))
    if single and SINGLE not in shards:
        raise ModelLoadError(
            f"'{directory}' has both {SINGLE} and an index of other files. Remove one of them."
        )
    files = {name: file for name, file in files.items() if not name.endswith(ignored)}
    found: dict[str, str] = {}
    for file in shards:
        found |= _names(directory, file, ignored)
    wrong = sorted(name for name in files | found if files.get(name) != found.get(name))
    if wrong:
        raise ModelLoadError(
            f"{directory / INDEX} disagrees with the files about {join_some(wrong)}."
        )
    return files


def check_tensors(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, str]
) -> None:
    """Checks that no tensor is missing, extra, misshapen or not numeric.

    Args:
      directory: the model's directory.
      shapes: name -> shape, of all that there should be; any may be there in MXFP4.
      files: as `tensor_files` gives them.
    """
    problems = []
    packed = {name for name in shapes if mxfp4.is_packed(name, files)}
    stored = {n: s for name in packed for n, s in mxfp4.packed_shapes(name, shapes[name]).items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in packed} | stored
    missing = sorted(set(shapes) - set(files))
    extra = sorted(set(files) - set(shapes))
    if missing:
        problems.append(f"{len(missing)} missing: {join_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} not in the architecture: {join_some(extra)}")
    for file, names in _by_file(shapes, files).items():
        with open_tensors(directory, file) as tensors:
            for name in names:
                piece = tensors.get_slice(name)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                if shape != shapes[name]:
                    problems.append(f"{name} has shape {shape}, expected {shapes[name]}")
                wanted = {"U8"} if name in stored else DTYPES
                if dtype not in wanted:
                    problems.append(f"{name} has dtype {dtype}, expected one of {sorted(wanted)}")
    if problems:
        hint = ""
        if "lm_head.weight" in missing + extra:
            hint = " Is tie_word_embeddings in config.json right?"
        raise ModelLoadError(
            f"tensors of '{directory}': {join_some(problems, separator='; ')}.{hint}"
        )


def read_tensors(
    directory: Path, names: Mapping[str, object], files: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each of the tensors with these names, shard by shard, then those in MXFP4.

    Raises:
      ModelLoadError: a number of one is NaN or infinite.
    """
    for file, inside in _by_file(names, files).items():
        with open_tensors(directory, file) as tensors:
            for name in inside:
                yield name, finite(directory / file, name, tensors.get_tensor(name))
    for name in names:
        if mxfp4.is_packed(name, files):
            with open_tensors(directory, files[name + mxfp4.BLOCKS]) as tensors:
                blocks = tensors.get_tensor(name + mxfp4.BLOCKS)
            with open_tensors(directory, files[name + mxfp4.SCALES]) as tensors:
                array = mxfp4.unpack(blocks, tensors.get_tensor(name + mxfp4.SCALES))
            yield name, finite(directory / files[name + mxfp4.BLOCKS], name, array)


def finite(file: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array itself, of which every number is one that float32 has.

    Raises:
      ModelLoadError: one is not, with the tensor's name.
    """
    bits, exponent = _EXPONENTS[array.dtype.name]
    # The largest exponent is that of NaN and infinity. Whole numbers compare faster than floats,
    # bfloat16 above all; a part at a time, so that nothing of the tensor's size is made.
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        fits = int((part.view(bits) & exponent).max()) < exponent
        if fits and array.dtype == np.float64:
            fits = bool(np.abs(part).max() <= np.finfo(np.float32).max)
        if not fits:
            raise ModelLoadError(
                f"{file}: {join_some([name])} holds numbers that are NaN or infinite, or too large "
                "for float32. The file is damaged, or the run that wrote it had diverged."
            )
    return array


_PART = 1 << 18  # numbers, which fit a processor's cache
# dtype -> integers of its width, and the bits of its exponent.
_EXPONENTS: dict[str, tuple[type, int]] = {
    "float64": (np.uint64, 0x7FF << 52),
    "float32": (np.uint32, 0x7F80_0000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}


def are_equal(directory: Path, one: str, other: str, files: Mapping[str, str]) -> bool:
    """Whether two tensors are there and hold the same numbers."""
    if one not in files or other not in files:
        return False
    kinds, starts = [], []
    for name in (one, other):
        with open_tensors(directory, files[name]) as tensors:
            piece = tensors.get_slice(name)
            kinds.append((tuple(piece.get_shape()), piece.get_dtype()))
            starts.append(piece[:1] if kinds[-1][1] in DTYPES else np.zeros(0))
    if kinds[0] != kinds[1] or kinds[0][1] not in DTYPES:
        return False
    if not np.array_equal(starts[0], starts[1]):  # without reading the rest
        return False
    read = dict(read_tensors(directory, {one: None, other: None}, files))
    return np.array_equal(read[one], read[other])


def write_shards(
    directory: Path, kinds: Mapping[str, Kind], array: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors to as few files as `SHARD_BYTES` allows, one after the other.

    Args:
      directory: where to.
      kinds: name -> shape and dtype, in the order of the file.
      array: gives a tensor by its name; asked once for each, in order.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        _stream_shard(directory / SINGLE, kinds, array)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _stream_shard(directory / file, {name: kinds[name] for name in names}, array)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _stream_shard(
    path: Path, kinds: Mapping[str, Kind], array: Callable[[str], np.ndarray]
) -> None:
    """Writes one file without holding more than one tensor.

    safetensors' own writer takes all tensors at once, and copies them. The layout: the length of
    the header, the header as JSON, padded to 8 bytes, and the tensors without gaps.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [begin, end]
        header[name] = {"dtype": _CODES[dtype.name], "shape": [*shape], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind in kinds.items():
            tensor = np.require(array(name), requirements="C")  # keeps a number a number
            assert (tensor.shape, tensor.dtype) == kind, name
            file.write(tensor.reshape(-1).view(np.uint8).data)


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file."""
    path.touch()
    mode = path.stat().st_mode  # what the umask says; safetensors lets nobody else read its files
    # safetensors 0.8 writes the memory as it lies, so that a transposed view would be undone.
    tensors = {name: np.require(array, requirements="C") for name, array in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def open_tensors(directory: Path, name: str):
    """Opens a safetensors file; errors while it is open name the file."""
    path = file_of(directory, name)
    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        where = directory / name
        raise ModelLoadError(f"{where}: not a readable safetensors file: {error}") from error


def _names(directory: Path, file: str, ignored: str) -> dict[str, str]:
    with open_tensors(directory, file) as tensors:
        return {name: file for name in tensors.keys() if not name.endswith(ignored)}


def _by_file(names: Mapping[str, object], files: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in names:
        if name in files:
            shards.setdefault(files[name], []).append(name)
    return shards
