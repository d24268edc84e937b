"""Hugging Face model directories to (model, params) and back: safetensors only, strictly.

Reading checks names, shapes, dtypes and file paths before a tensor is touched; a directory with a
missing, extra or misshapen tensor is refused with the list of them. No model code is ever run.
"""

import contextlib
import dataclasses
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

from relax.errors import ModelLoadError, RelaxError
from relax.models.config import TransformerConfig
from relax.models.families import family_of
from relax.models.transformer import Transformer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # a shard is larger only where one tensor is
JSON_BYTES = 50_000_000  # the longest indices of real models are a fifth of that
MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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
    files = _tensor_files(directory, family)
    _check_tensors(directory, expected, files)
    flat = {}
    for file, names in _by_file(expected, files).items():
        with _open(directory, file) as tensors:
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
      dtype: of the tensors in the file; None: the narrowest that holds all of them exactly.

    Returns:
      The directory.

    Raises:
      RelaxError: `path` is a file, or a directory with more in it than a model.
      ValueError: `params` are not those of the model.
    """
    path = Path(path).expanduser().resolve()
    _check_replaceable(path)
    family = family_of("llama")
    leaves = _named_leaves(family, model, params)
    if dtype is None:  # one that holds every leaf exactly: transformers loads all in this one
        dtype = jnp.result_type(*(leaf.dtype for leaf, _ in leaves.values()))
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, leaves, np.dtype(dtype))
        ids = dict.fromkeys(TOKEN_IDS)  # null, since transformers takes 1 and 2 for absent ones
        if tokenizer is not None:
            ids = _token_ids(tokenizer)
            tokenizer.save_pretrained(temporary)
        config = family.to_hugging_face(model.config) | {"dtype": np.dtype(dtype).name} | ids
        _write_json(temporary / "config.json", config)
        generation = {name: token_id for name, token_id in ids.items() if token_id is not None}
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
    name = str(path)
    directory = os.path.expanduser(name)
    if os.path.isdir(directory):
        return Path(directory)
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


def read_config(directory: Path):
    """`(family, TransformerConfig)` from config.json."""
    fields = _read_json(directory, "config.json")
    where = str(directory / "config.json")
    family = family_of(fields.get("model_type"), where)
    return family, family.from_hugging_face(fields, where)


def expected_tensors(family, config: TransformerConfig) -> dict[str, tuple[tuple, tuple]]:
    """Name in the file -> (path in our params, shape in the file), for every tensor of a model."""
    # Layers are alike: tracing one of them is enough, and takes the same time for a deep model.
    model = Transformer(dataclasses.replace(config, num_hidden_layers=1))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    expected = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        shape = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        paths = [path]
        if path[0] == "layers_0":
            paths = [(f"layers_{i}", *path[1:]) for i in range(config.num_hidden_layers)]
        expected |= {family.tensor_name(ours): (ours, shape) for ours in paths}
    return expected


def _file(directory: Path, name: str) -> Path:
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
            f"'{directory}': {_some([name])} is not the plain name of a file in it."
        )
    try:
        target = Path(os.path.realpath(root / name))
        regular, there = target.is_file(), os.path.lexists(root / name)
    except (OSError, ValueError):  # a name too long, or with a zero byte
        raise ModelLoadError(f"'{directory}': no file can be named {_some([name])}.") from None
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


def _read_json(directory: Path, name: str) -> dict:
    file = _file(directory, name)
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


@contextlib.contextmanager
def _open(directory: Path, name: str):
    """A safetensors file; what goes wrong while it is open is told with its name."""
    path = _file(directory, name)
    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        where = directory / name
        raise ModelLoadError(f"{where}: not a readable safetensors file: {error}") from error


def _tensor_files(directory: Path, family) -> dict[str, str]:
    """Tensor name -> shard file, from the index or from the single file."""
    single, index = (os.path.lexists(directory / name) for name in (SINGLE, INDEX))
    if not single and not index:
        raise ModelLoadError(
            f"'{directory}' has neither {SINGLE} nor {INDEX}. Other formats are not read: save the "
            "model with transformers' save_pretrained."
        )
    if not index:
        return _tensor_names(directory, SINGLE, family)
    files = _read_json(directory, INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelLoadError(f"{directory / INDEX}: no weight_map of tensor names to files.")
    shards = sorted(set(files.values()))
    if single and SINGLE not in shards:
        raise ModelLoadError(
            f"'{directory}' has both {SINGLE} and an index of other files. Remove one of them."
        )
    files = {name: file for name, file in files.items() if not name.endswith(family.DERIVED)}
    found: dict[str, str] = {}
    for file in shards:
        found |= _tensor_names(directory, file, family)
    wrong = sorted(name for name in files | found if files.get(name) != found.get(name))
    if wrong:
        raise ModelLoadError(f"{directory / INDEX} disagrees with the files about {_some(wrong)}.")
    return files


def _tensor_names(directory: Path, file: str, family) -> dict[str, str]:
    with _open(directory, file) as tensors:
        return {name: file for name in tensors.keys() if not name.endswith(family.DERIVED)}


def _check_tensors(directory: Path, expected: Mapping, files: Mapping[str, str]) -> None:
    problems = []
    missing = sorted(set(expected) - set(files))
    extra = sorted(set(files) - set(expected))
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} not in the architecture: {_some(extra)}")
    for file, names in _by_file(expected, files).items():
        with _open(directory, file) as tensors:
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
        raise ModelLoadError(f"tensors of '{directory}': {_some(problems, '; ')}.{hint}")


def _by_file(expected: Mapping, files: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in expected:
        if name in files:
            shards.setdefault(files[name], []).append(name)
    return shards


def _named_leaves(family, model: Transformer, params) -> dict[str, tuple[jax.Array, bool]]:
    """Name in the file -> (leaf, whether the file holds it transposed)."""
    flat = flax.traverse_util.flatten_dict(params)
    expected = expected_tensors(family, model.config)
    wrong = [f"no {'/'.join(ours)}" for ours, _ in expected.values() if ours not in flat]
    wrong += [
        f"unknown {'/'.join(ours)}" for ours in flat.keys() - {o for o, _ in expected.values()}
    ]
    leaves = {}
    for name, (ours, shape) in expected.items():
        if ours in flat:
            leaf, transposed = flat[ours], ours[-1] == "kernel"
            leaves[name] = (leaf, transposed)
            if (leaf.shape[::-1] if transposed else leaf.shape) != shape:
                wrong.append(f"{'/'.join(ours)} of shape {leaf.shape}")
    if wrong:
        raise ValueError(f"params are not those of the model: {_some(sorted(wrong))}.")
    return leaves


def _write_shards(directory: Path, leaves: Mapping, dtype: np.dtype) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (leaf, _) in leaves.items():
        nbytes = leaf.size * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes
    if len(shards) == 1:
        _write_shard(directory / SINGLE, leaves, dtype)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, {name: leaves[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, file)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, leaves: Mapping, dtype: np.dtype) -> None:
    tensors = {}
    for name, (leaf, transposed) in leaves.items():
        array = np.asarray(jax.device_get(leaf))
        tensors[name] = np.ascontiguousarray(array.T if transposed else array, dtype)
    path.touch()
    mode = path.stat().st_mode  # what the umask says; safetensors lets nobody else read its files
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _token_ids(tokenizer) -> dict[str, int | None]:
    ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    if ids["pad_token_id"] == ids["eos_token_id"]:
        # Whoever masks padding by its id would mask the end of every answer with it.
        ids["pad_token_id"] = None
    return ids


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_replaceable(path: Path) -> None:
    """What is at `path` will be deleted, so it must be a model and nothing else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RelaxError(f"'{path}' is a file; a model is saved as a directory. Choose another.")
    other = [f.name for f in path.iterdir() if f.suffix not in MODEL_FILES or f.is_dir()]
    if other:
        raise RelaxError(
            f"'{path}' holds more than a model, which saving would delete: {_some(sorted(other))}. "
            "Choose another directory, or move them away."
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


def _some(names: list[str], separator: str = ", ", most: int = 4) -> str:
    """The first few, fit for one line: a damaged file may name its tensors anything."""
    shown = [name if name.isprintable() and name else repr(name) for name in names[:most]]
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in shown]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(shown) + more
