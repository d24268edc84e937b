"""Writes a GGUF file, for llama.cpp and what is built on it, one tensor at a time.

Names, metadata and the order of rows are those of llama.cpp's own converter, and the inverse of
what `relax.tools.gguf.convert` reads: nothing is written that it would read back as another model.

Source: llama.cpp authors, conversion/base.py, llama.py, qwen.py and gemma.py, 2023-2026.
"""

import dataclasses
import mmap
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from relax.config.text import join_some
from relax.errors import ModelLoadError, RelaxError
from relax.files import TMP_SUFFIX, fsync_path
from relax.models.config import TransformerConfig
from relax.models.families import family_of
from relax.models.families.family import comparable
from relax.models.rope import Rope
from relax.models.rotary import frequencies
from relax.tools.gguf.convert import FOUR_NORMS, MODULES, TOP
from relax.tools.gguf.fields import ARCHITECTURES, FIELDS, ROPE_FREQS, hugging_face_fields
from relax.tools.gguf.file import GGUFFile, Tensor
from relax.tools.gguf.tokenizer import gguf_tokenizer
from relax.tools.gguf.tokenizer_write import add_tokenizer, check_tokenizer

WRITTEN = ("llama", "qwen2", "qwen3", "gemma3")  # architectures that are held to the converter
FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
GRANITE_VOCABULARY = 49152  # for which the converter sets add_bos_token to false; also SmolLM's


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """What a file is made of.

    Attributes:
      directory: with config.json, and what names the model in the metadata.
      tokenizer_directory, tokenizer: of the tokenizer; None if there is none.
      config: the model's configuration.
      fields: the contents of config.json, with the defaults of transformers.
      shapes: Hugging Face name of a tensor -> its shape.
      read: gives a tensor by its Hugging Face name, as float32.
    """

    directory: Path
    tokenizer_directory: Path
    tokenizer: object | None
    config: TransformerConfig
    fields: Mapping
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Draft(GGUFFile):
    """The file before its tensors are written."""

    factors: np.ndarray | None

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        assert name == ROPE_FREQS and self.factors is not None
        return self.factors


def write_gguf(source: GGUFSource, path: Path, kind: str) -> list[str]:
    """Writes a file, completely or not at all.

    Args:
      source: the model.
      path: the new file; one that is there is replaced.
      kind: type of the matrices: f16, bf16, q8_0 or q4_0; vectors are float32.

    Returns:
      Sentences about matrices that are float16 since their rows do not divide into blocks.

    Raises:
      ModelLoadError: the file would be read back as another model or tokenizer, or the family is
        not written; nothing is written.
      RelaxError: a number is too large for float16.
    """
    import gguf

    name = _architecture(source)
    names = {_theirs(ours, name): ours for ours in source.shapes}
    types = {t: _type(gguf, t, source.shapes[ours], kind) for t, ours in names.items()}
    factors = _rope_factors(source.config)
    writer = gguf.GGUFWriter(None, name)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
    for theirs, ours in names.items():
        shape = source.shapes[ours]
        block, size = gguf.GGML_QUANT_SIZES[types[theirs]]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), nbytes, types[theirs])
    _add_metadata(gguf, writer, source, kind)
    _check(writer, source, path, factors)
    temporary = path.with_name(path.name + TMP_SUFFIX)
    try:
        writer.write_header_to_file(path=temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for theirs, ours in names.items():
            writer.write_tensor_data(_data(gguf, source, theirs, ours, types[theirs]))
        writer.close()
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    left = [names[t] for t, type_ in types.items() if "weight" in t and type_.name == "F16"]
    if kind in ("f16", "bf16") or not left:
        return []
    return [f"rows of {join_some(left)} do not divide into blocks of 32: written as float16"]


def _architecture(source: GGUFSource) -> str:
    model_type = source.config.model_type
    known = {ARCHITECTURES[name].model_type: name for name in WRITTEN}
    if model_type not in known:
        raise ModelLoadError(
            f"'{source.directory}' is a {model_type} model, which is not written as GGUF; "
            f"{', '.join(known)} are."
        )
    return known[model_type]


def _theirs(name: str, architecture: str) -> str:
    """llama.cpp's name of a tensor; an unknown name is kept, and refused by `_check`.

    >>> _theirs("model.layers.3.self_attn.q_proj.weight", "llama")
    'blk.3.attn_q.weight'
    """
    modules = FOUR_NORMS if ARCHITECTURES[architecture].gemma else MODULES
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if found is None:
        return next((theirs for theirs, ours in TOP.items() if ours == name), name)
    module = {ours: theirs for theirs, ours in modules.items()}.get(found[2], found[2])
    return f"blk.{found[1]}.{module}.{found[3]}"


def _type(gguf, name: str, shape: tuple[int, ...], kind: str):
    """The type of a tensor; a matrix whose rows do not divide into blocks is F16."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return kinds.F32
    wanted = kinds[kind.upper()]
    return kinds.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _data(gguf, source: GGUFSource, theirs: str, ours: str, type_) -> np.ndarray:
    """A tensor as the file holds it."""
    array, config = source.read(ours), source.config
    kind = ARCHITECTURES[_architecture(source)]
    if kind.gemma and theirs.endswith("norm.weight"):
        array = array + 1
    if kind.interleaved and ".attn_q." in theirs:
        array = interleaved(array, config.num_attention_heads)
    if kind.interleaved and ".attn_k." in theirs:
        array = interleaved(array, config.num_key_value_heads)
    if type_.name == "F16" and np.abs(array).max() > np.finfo(np.float16).max:
        raise RelaxError(
            f"{ours} has numbers up to {np.abs(array).max():.3g}, too large for float16; choose "
            "--type bf16."
        )
    return gguf.quantize(np.ascontiguousarray(array, np.float32), type_)


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from halves to interleaved rotary pairs.

    >>> interleaved(np.array([0, 2, 1, 3, 4, 6, 5, 7]), heads=2)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _rope_factors(config: TransformerConfig) -> np.ndarray | None:
    """What Llama 3's scaling divides each frequency by; None without it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    plain, scaled = (
        frequencies(Rope(config.rope_theta, s), config.head_dim) for s in (None, scaling)
    )
    return np.asarray(plain / scaled, np.float32)


def _add_metadata(gguf, writer, source: GGUFSource, kind: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    count = writer.get_total_parameter_count()[0]
    metadata = gguf.Metadata.load(None, source.directory, None, count)
    metadata.name = metadata.name or source.directory.name
    metadata.size_label = metadata.size_label or gguf.size_label(count, 0, 0, 0)
    metadata.set_gguf_meta_model(writer)
    for key, value in _model_keys(source).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{writer.arch}.{key}", value)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if source.tokenizer is None:
        return
    vocab_size = source.config.vocab_size
    add_tokenizer(writer, source.tokenizer_directory, source.tokenizer, vocab_size)
    if writer.arch == "llama" and vocab_size == GRANITE_VOCABULARY:
        writer.add_add_bos_token(False)


def _model_keys(source: GGUFSource) -> dict:
    """The keys of the architecture, without its name."""
    config, fields = source.config, source.fields
    keys = {key: getattr(config, ours) for key, ours in FIELDS.items()}
    if fields.get("head_dim") is None:
        del keys["attention.key_length"]
    else:
        keys["attention.value_length"] = config.head_dim
    keys["rope.freq_base"] = float(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling is not None and scaling.kind == "yarn":
        length = scaling.original_max_position_embeddings
        keys["rope.scaling.original_context_length"] = length
        written = fields.get("rope_parameters") or {}
        for key in ("beta_fast", "beta_slow"):
            if written.get(key) is not None:
                keys[f"rope.scaling.yarn_{key}"] = float(getattr(scaling, key))
    if config.model_type == "llama":
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if config.model_type == "gemma3_text":
        keys["rope.freq_base_swa"] = float(config.local_rope_theta or config.rope_theta)
        if config.sliding_window is not None:
            keys["attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping is not None:
            keys["final_logit_softcapping"] = config.final_logit_softcapping
    return keys


def _check(writer, source: GGUFSource, path: Path, factors: np.ndarray | None) -> None:
    """Reads the metadata back, and refuses what they turn into another model or tokenizer."""
    entries = {key: entry.value for key, entry in writer.kv_data[0].items()}
    infos = writer.tensors[0].items()
    tensors = {name: Tensor(tuple(t.shape), int(t.dtype), 0, 0) for name, t in infos}
    draft = _Draft(path, mmap.mmap(-1, 1), entries, tensors, factors)
    family = family_of(source.config.model_type)
    read = family.from_hugging_face(hugging_face_fields(draft), str(path))
    asked, back = comparable(source.config), comparable(read)
    lost = [n for n in asked if _stored(asked[n]) != _stored(back[n]) and n != "initializer_range"]
    if lost:
        raise ModelLoadError(
            f"a GGUF file of {writer.arch} cannot hold '{source.directory}': {lost[0]} is "
            f"{asked[lost[0]]!r} and would be read as {back[lost[0]]!r}."
        )
    if source.tokenizer is not None:
        check_tokenizer(source.tokenizer, gguf_tokenizer(draft), path)


def _stored(value):
    """A value of a configuration as a GGUF file stores it: numbers in float32."""
    return float(np.float32(value)) if isinstance(value, float) else value
