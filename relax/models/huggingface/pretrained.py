"""Hugging Face model directories to (model, params) and back: safetensors only, strictly.

Reading checks names, shapes, dtypes and file paths before a tensor is touched; a directory with a
missing, extra or misshapen tensor is refused with the list of them. No model code is ever run.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.files import read_json
from relax.models.config import TransformerConfig
from relax.models.families import Family, family_of
from relax.models.families.family import FOLLOWING
from relax.models.huggingface.directories import (
    find_directory,
    new_directory,
    write_json,
)
from relax.models.huggingface.sharded_read import read_params
from relax.models.huggingface.shards import are_equal, check_tensors, tensor_files, write_shards
from relax.models.huggingface.tensors import Tensors, expected_tensors, from_params, shape_of
from relax.models.huggingface.text_parts import (
    Names,
    Surroundings,
    names_in,
    read_config,
    text_fields,
)
from relax.models.transformer import Transformer
from relax.parallel import processes

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
CLASSIFIER = "ForSequenceClassification"


def load_pretrained(
    path: str | os.PathLike,
    dtype=jnp.float32,
    *,
    param_dtype=jnp.float32,
    gradient_checkpointing: bool = False,
    quantize=None,
) -> tuple[Transformer, dict]:
    """Reads a Hugging Face directory.

    Args:
      path: a directory with config.json and safetensors, or a hub name where there is a network.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      gradient_checkpointing: see `Transformer`.
      quantize: a `relax.models.huggingface.quantized.BaseQuantizer`: linear layers are quantised
        as they are read, to be trained with adapters. None: they are not.

    Returns:
      The model and its parameters; `model.apply({"params": params}, input_ids)` gives logits.

    Raises:
      ModelLoadError: the architecture is unknown, a field of config.json is unsupported, or a
        tensor is missing, extra, misshapen or unreadable.
    """
    config, params = _load_directory(find_directory(path), param_dtype, quantize)
    model = Transformer(config, jnp.dtype(dtype), jnp.dtype(param_dtype), gradient_checkpointing)
    return model, params


def _load_directory(directory: Path, param_dtype, quantize) -> tuple[TransformerConfig, dict]:
    config, expected, files = checked_files(directory)
    return config, read_params(directory, expected, files, param_dtype, quantize)


def checked_files(directory: Path) -> tuple[TransformerConfig, Tensors, dict[str, str]]:
    """The configuration of a model, its tensors, and their files; no tensor is read yet.

    Raises:
      ModelLoadError: see `load_pretrained`.
    """
    family, config = read_config(directory)
    if is_classifier(directory):
        raise ModelLoadError(
            f"'{directory}' holds a sequence classifier, which scores texts and writes none. Give "
            "a language model here; a reward model is named by --reward_funcs model:DIR."
        )
    files = tensor_files(directory, ignored=FOLLOWING)
    names = names_in(directory, files)
    own = _used(names.own(files), family, config)
    head, embeddings = map(names.in_file, ("lm_head.weight", "model.embed_tokens.weight"))
    if config.tie_word_embeddings and are_equal(directory, head, embeddings, files):
        del own["lm_head.weight"]  # Qwen 3 holds the matrix twice
    expected = renamed(expected_in(own, family, config), names)
    files = renamed(own, names)
    check_tensors(directory, {name: shape_of(parts) for name, parts in expected.items()}, files)
    return config, expected, files


def save_pretrained(
    path: str | os.PathLike,
    model: Transformer,
    params,
    tokenizer=None,
    *,
    dtype=None,
    generation_config: Mapping | None = None,
    beside: str | os.PathLike | None = None,
) -> Path:
    """Writes a Hugging Face directory that transformers and vLLM load.

    The directory appears whole or not at all; one that is there is replaced.

    Args:
      path: the directory.
      model, params: as `load_pretrained` gives them.
      tokenizer: written beside them, with its chat template.
      dtype: dtype of the tensors in the file; None: the narrowest that holds all of them exactly.
      generation_config: what generation_config.json holds besides the tokenizer's ids, as
        `read_generation_config` gives it for the model that was trained: a model may end its turns
        in several ways, of which a tokenizer knows one.
      beside: a directory of a model of images and text whose text part `model` is: all that is in
        it besides is written too, each tensor byte for byte. None: a text model alone.

    Returns:
      The directory.

    Raises:
      RelaxError: `path` is a file, or a directory with more in it than a model.
      ValueError: `params` are not those of the model, or its family has no such model.
    """
    family = family_of(model.config.model_type)
    fields, generation = config_fields(model.config, tokenizer, generation_config)
    expected = expected_tensors(family, model.config)
    others = None if beside is None else Surroundings(find_directory(beside), model.config)
    if others is not None:
        expected = renamed(expected, others.names)
    return write_model(path, fields, expected, params, tokenizer, dtype, generation, others)


def config_fields(
    config: TransformerConfig, tokenizer=None, generation_config: Mapping | None = None
) -> tuple[dict, dict]:
    """The contents of config.json and generation_config.json that `save_pretrained` writes."""
    generation = _generation_config(tokenizer, dict(generation_config or {}))
    fields = family_of(config.model_type).to_hugging_face(config)
    # Null where there is none, since transformers takes 1 and 2 for absent ones.
    return fields | {name: generation.get(name) for name in TOKEN_IDS}, generation


def write_model(
    path: str | os.PathLike,
    fields: dict,
    expected: Tensors,
    params,
    tokenizer=None,
    dtype=None,
    generation: dict | None = None,
    others: Surroundings | None = None,
) -> Path:
    """Writes a directory whose config.json holds `fields`, and its files the tensors `expected`.

    The other arguments and what is raised are those of `save_pretrained`.
    """
    flat = flax.traverse_util.flatten_dict(params)
    _check_leaves(expected, flat)
    if dtype is None:  # one that holds every leaf exactly: transformers loads all in this one
        dtype = jnp.result_type(*(leaf.dtype for leaf in flat.values()))
    dtype = np.dtype(dtype)
    if not processes.is_main():  # takes part in gathering arrays that span processes
        for parts in expected.values():
            from_params(parts, flat, dtype)
        return Path(path)

    def read(name: str) -> np.ndarray:
        return from_params(expected[name], flat, dtype)

    return write_directory(path, fields, expected, read, tokenizer, dtype, generation, others)


def write_directory(
    path: str | os.PathLike,
    fields: dict,
    expected: Tensors,
    read: Callable[[str], np.ndarray],
    tokenizer,
    dtype: np.dtype,
    generation: dict | None,
    others: Surroundings | None = None,
) -> Path:
    """Writes a directory from tensors that are read one after the other.

    Args:
      path, fields, expected, tokenizer, generation: see `write_model`.
      read: gives the array of a tensor of `expected`, of the type `dtype`.
      dtype: dtype of all arrays; config.json names it.
      others: tensors to write beside them, with a config.json of their own.
    """
    kinds = {name: (shape_of(parts), dtype) for name, parts in expected.items()}
    fields = fields | {"dtype": dtype.name}
    if others is not None:
        kinds, fields = kinds | others.kinds(), others.fields(dtype.name)
    with new_directory(path) as (directory, path):
        if others is None:
            write_shards(directory, kinds, read)
        else:
            read_other = others.read
            write_shards(directory, kinds, lambda n: (read if n in expected else read_other)(n))
            others.copy_processors(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        write_json(directory / "config.json", fields)
        if generation is not None:
            write_json(directory / GENERATION, generation)
    return path


def read_pretrained_config(path: str | os.PathLike) -> TransformerConfig:
    """Reads the configuration of a model without its weights."""
    return read_config(find_directory(path))[1]


def read_generation_config(path: str | os.PathLike) -> dict:
    """The contents of generation_config.json of a Hugging Face directory.

    Where there is none, the token ids of config.json, as transformers takes them.

    Raises:
      ModelLoadError: `eos_token_id` is no id of the model and no list of some.
    """
    directory = find_directory(path)
    config, place = text_fields(directory)
    if os.path.lexists(directory / GENERATION):
        where, fields = directory / GENERATION, read_json(directory, GENERATION)
    else:
        where = Path(place)
        fields = {n: config[n] for n in TOKEN_IDS if config.get(n) is not None}
    V = config.get("vocab_size")
    for token_id in _as_list(fields.get("eos_token_id")):
        if not is_token_id(token_id) or isinstance(V, int) and token_id >= V:
            raise ModelLoadError(
                f"{where}: eos_token_id must be a token id below vocab_size {V}, or a list of "
                f"them, got {repr(fields['eos_token_id'])[:80]}."
            )
    return fields


def is_token_id(value) -> bool:
    """Whether a value of a JSON file may be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def is_classifier(directory: Path) -> bool:
    """Whether the config.json of a directory says that it holds a sequence classifier."""
    names = read_json(directory, "config.json").get("architectures")
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIER) for name in names)


def expected_in(files: Mapping, family: Family, config: TransformerConfig) -> Tensors:
    """The tensors that the files should hold, under those of the family's names that they use."""
    for also in family.also_named:
        expected = expected_tensors(family, config, also)
        if expected.keys() == files.keys():
            return expected
    return expected_tensors(family, config)


def _used(files: Mapping, family: Family, config: TransformerConfig) -> dict:
    unread = family.unread(config)
    return {name: file for name, file in files.items() if name not in unread}


def renamed(tensors: Mapping, names: Names) -> dict:
    """What is known of tensors, by their names in a file."""
    return {names.in_file(name): value for name, value in tensors.items()}


def _check_leaves(expected: Tensors, flat: Mapping) -> None:
    shapes = {}
    for parts in expected.values():
        for part in parts:
            shape = part.shape
            if part.transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            stacked = () if part.expert is None else (part.expert + 1,)
            shapes[part.path] = (*stacked, *shape)  # the last expert gives their number
    wrong = [f"no {'/'.join(path)}" for path in shapes.keys() - flat.keys()]
    wrong += [f"unknown {'/'.join(path)}" for path in flat.keys() - shapes.keys()]
    wrong += [
        f"{'/'.join(path)} of shape {flat[path].shape}"
        for path in shapes.keys() & flat.keys()
        if flat[path].shape != shapes[path]
    ]
    if wrong:
        raise ValueError(f"params are not those of the model: {join_some(sorted(wrong))}.")


def _generation_config(tokenizer, before: dict) -> dict:
    """generation_config.json: what it was, with the ids of the tokenizer there is now."""
    ids = {name: getattr(tokenizer, name, None) for name in TOKEN_IDS}
    ends = _as_list(before.get("eos_token_id"))
    if ids["eos_token_id"] not in (None, *ends):
        ends = [*ends, ids["eos_token_id"]]
    generation = before | {name: token_id for name, token_id in ids.items() if token_id is not None}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if generation.get("pad_token_id") in ends:
        # Whoever masks padding by its id would mask the end of every answer with it.
        del generation["pad_token_id"]
    return generation
