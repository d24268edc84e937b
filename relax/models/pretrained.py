"""Hugging Face model directories to (model, params) and back: safetensors only, strictly.

Reading checks names, shapes, dtypes and shard paths before a tensor is touched; a directory with a
missing, extra or misshapen tensor is refused with the list of them. No model code is ever run.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from relax.errors import ModelLoadError
from relax.models.config import TransformerConfig
from relax.models.families import family_of
from relax.models.transformer import Transformer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_DTYPES = {"F32", "F16", "BF16", "F64"}


def load_pretrained(
    path: str | os.PathLike,
    dtype=jnp.float32,
    *,
    param_dtype=jnp.float32,
    gradient_checkpointing: bool = False,
) -> tuple[Transformer, dict]:
    """Reads a Hugging Face directory.

    Args:
      path: a directory with config.json and safetensors, or a hub name where there is a network.
      dtype: of the computation.
      param_dtype: of the parameters.
      gradient_checkpointing: see `Transformer`.

    Returns:
      The model and its parameters; `model.apply({"params": params}, input_ids)` gives logits.

    Raises:
      ModelLoadError: the architecture is unknown, a field of config.json asks for what we do not
        compute, or a tensor is missing, extra, misshapen or unreadable.
    """
    directory = find_directory(path)
    family, config = read_config(directory)
    model = Transformer(config, jnp.dtype(dtype), jnp.dtype(param_dtype), gradient_checkpointing)
    expected = expected_tensors(family, config)
    files = _tensor_files(directory)
    _check_tensors(directory, expected, files)
    flat = {}
    for file, names in _by_file(expected, files).items():
        with safe_open(directory / file, framework="numpy") as tensors:
            for name in names:
                ours, _ = expected[name]
                array = tensors.get_tensor(name)
                if ours[-1] == "kernel":  # [out, in] -> [in, out]
                    array = np.ascontiguousarray(array.T)
                flat[ours] = jnp.asarray(array, param_dtype)
    return model, flax.traverse_util.unflatten_dict(flat)


def save_pretrained(
    path: str | os.PathLike, model: Transformer, params, tokenizer=None, *, dtype=None
) -> Path:
    """Writes a Hugging Face directory that transformers and vLLM load.

    The directory appears whole or not at all; one that is there is replaced.

    Args:
      path: the directory.
      model, params: as `load_pretrained` gives them.
      tokenizer: written beside them, with its chat template.
      dtype: of the tensors in the file; None: as they are.

    Returns:
      The directory.
    """
    path = Path(path)
    family = family_of("llama")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        flat = flax.traverse_util.flatten_dict(params)
        names = {ours: name for name, (ours, _) in expected_tensors(family, model.config).items()}
        tensors = {}
        for ours, name in names.items():
            array = np.asarray(jax.device_get(flat[ours]))
            array = array.T if ours[-1] == "kernel" else array
            tensors[name] = np.ascontiguousarray(array if dtype is None else array.astype(dtype))
        _write_shards(temporary, tensors)
        dtypes = {str(array.dtype) for array in tensors.values()}
        config = family.to_hugging_face(model.config) | {"dtype": dtypes.pop()}
        generation = {}
        if tokenizer is not None:
            generation = _token_ids(tokenizer)
            config |= generation
            tokenizer.save_pretrained(temporary)
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", generation)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def read_pretrained_config(path: str | os.PathLike) -> TransformerConfig:
    """The sizes of a Hugging Face directory's model, without its weights."""
    return read_config(find_directory(path))[1]


def find_directory(path: str | os.PathLike) -> Path:
    """A local model directory as it is; a hub name downloaded where there is a network."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    name = str(path)
    if directory.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelLoadError(
            f"no model directory at '{name}'. Give a directory with config.json and "
            "model.safetensors, or a hub name such as owner/model."
        )
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub client raises a dozen kinds, none of ours
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"'{name}' is no directory here and could not be fetched from the hub: {reason}"
        ) from error


def read_config(directory: Path):
    """`(family, TransformerConfig)` from config.json."""
    file = directory / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"'{directory}' has no config.json: it is no model.") from None
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{file}: must hold an object, got {type(fields).__name__}.")
    family = family_of(fields.get("model_type"), where=str(file))
    try:
        return family, family.from_hugging_face(fields, where=str(file))
    except (TypeError, KeyError) as error:
        raise ModelLoadError(f"{file}: a field is missing or mistyped: {error}") from error


def expected_tensors(family, config: TransformerConfig) -> dict[str, tuple[tuple, tuple]]:
    """Name in the file -> (path in our params, shape in the file), for every tensor of a model."""
    model = Transformer(config)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    expected = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        shape = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        expected[family.tensor_name(path)] = (path, shape)
    return expected


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> shard file, from the index or from the single file."""
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise ModelLoadError(f"'{directory}' has neither {SINGLE} nor {INDEX}.")
        return dict.fromkeys(_header(directory, SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = dict(weight_map)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{index}: no weight_map of tensor names to files: {error}") from error
    found = {}
    for file in sorted(set(files.values()), key=str):
        found |= dict.fromkeys(_header(directory, file), file)
    wrong = sorted(name for name in files | found if files.get(name) != found.get(name))
    if wrong:
        raise ModelLoadError(f"{index} disagrees with the shards about {_some(wrong)}.")
    return files


def _header(directory: Path, file) -> list[str]:
    """The tensor names of a shard; its name must be a plain file's, inside the directory."""
    plain = isinstance(file, str) and file == os.path.basename(file) and file not in ("", "..")
    path = directory / file if plain else None
    # The hub's cache links its files into a store beside the snapshot, which is not leaving it.
    if not plain or not path.is_file():
        raise ModelLoadError(f"'{directory}': the shard {file!r} is no plain file in it.")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: not a readable safetensors file: {error}") from error


def _check_tensors(directory: Path, expected: Mapping, files: Mapping[str, str]) -> None:
    problems = []
    missing = sorted(set(expected) - set(files))
    extra = sorted(set(files) - set(expected))
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} not in the architecture: {_some(extra)}")
    for file, names in _by_file(expected, files).items():
        with safe_open(directory / file, framework="numpy") as tensors:
            for name in names:
                piece = tensors.get_slice(name)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                if shape != expected[name][1]:
                    problems.append(f"{name} has shape {shape}, expected {expected[name][1]}")
                if dtype not in _DTYPES:
                    problems.append(f"{name} has dtype {dtype}, expected one of {sorted(_DTYPES)}")
    if problems:
        hint = ""
        if "lm_head.weight" in missing + extra:
            hint = " Is tie_word_embeddings in config.json right?"
        raise ModelLoadError(f"tensors of '{directory}': {'; '.join(problems[:8])}.{hint}")


def _by_file(expected: Mapping, files: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in expected:
        if name in files:
            shards.setdefault(files[name], []).append(name)
    return shards


def _write_shards(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    if len(shards) == 1:
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _token_ids(tokenizer) -> dict:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if ids["pad_token_id"] == ids["eos_token_id"]:
        # Whoever masks padding by its id would mask the end of every answer with it.
        del ids["pad_token_id"]
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(temporary: Path, path: Path) -> None:
    """Puts a finished directory in its place; what was there is out of the way until then."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
