"""Converts a GGUF file to a Hugging Face model directory.

Fields of config.json and names of tensors are translated, and the model family checks them like
those of a directory. The changes of llama.cpp's converter are reverted: it reorders the rows of
Llama's queries and keys, since it rotates neighbouring entries of a head, whereas Hugging Face
rotates the two halves, and it adds 1 to the norms of Gemma.

Source: llama.cpp authors, convert_hf_to_gguf.py and src/llama-model.cpp, 2023-2026.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.models.config import TransformerConfig
from relax.models.families import Family, family_of
from relax.models.huggingface.pretrained import config_fields, write_directory
from relax.models.huggingface.tensors import expected_tensors, shape_of
from relax.tools.gguf.fields import ROPE_FREQS, architecture_of, hugging_face_fields
from relax.tools.gguf.file import GGUFFile, read_gguf
from relax.tools.gguf.tokenizer import gguf_tokenizer

# llama.cpp's names -> Hugging Face's; `{}` is the index of an expert (one tensor in GGUF).
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
FOUR_NORMS = MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file viewed as a Hugging Face directory.

    Attributes:
      file: the open file.
      fields: the contents of config.json.
      names: Hugging Face name of a tensor -> its name in the file, and its expert or None.
    """

    file: GGUFFile
    fields: dict
    names: dict[str, tuple[str, int | None]]

    def shape(self, name: str) -> tuple[int, ...]:
        theirs, expert = self.names[name]
        return self.file.tensors[theirs].shape[0 if expert is None else 1 :]

    def read(self, name: str) -> np.ndarray:
        """The tensor with a Hugging Face name, as float32."""
        theirs, expert = self.names[name]
        kind = architecture_of(self.file)
        array = self.file.read(theirs, expert)
        if kind.gemma and theirs.endswith("norm.weight"):
            return array - 1
        if kind.interleaved and ".attn_q." in theirs:
            return _halves(array, self.fields["num_attention_heads"])
        if kind.interleaved and ".attn_k." in theirs:
            return _halves(array, self.fields["num_key_value_heads"])
        return array


def convert_gguf(path: str | os.PathLike, directory: str | os.PathLike, dtype="float32") -> bool:
    """Writes the model of a GGUF file as a Hugging Face directory, one tensor at a time.

    The directory holds config.json, safetensors, generation_config.json and the tokenizer with its
    chat template. It is written completely or not at all.

    Args:
      path: path of the file; its tensors are dequantised.
      directory: target directory; a model in it is replaced.
      dtype: dtype of the written tensors; float32 represents every quantisation exactly.

    Returns:
      Whether the file had a tokenizer, which is then in the directory.

    Raises:
      ModelLoadError: see `open_gguf` and `gguf_tokenizer`; or a tensor is missing, extra, misshapen
        or of a type that cannot be dequantised.
      RelaxError: `directory` is a file, or a directory with other files than a model's.
    """
    source = open_gguf(path)
    family, config = _read_config(source)
    expected = expected_tensors(family, config)
    _check_tensors(source, {name: shape_of(parts) for name, parts in expected.items()})
    tokenizer = gguf_tokenizer(source.file)
    fields, generation = config_fields(config, tokenizer, end_tokens(source.file))
    kind = jnp.dtype(dtype)  # numpy alone has no bfloat16

    def read(name: str) -> np.ndarray:
        return source.read(name).astype(kind)

    write_directory(directory, fields, expected, read, tokenizer, kind, generation)
    return tokenizer is not None


def read_gguf_config(path) -> TransformerConfig:
    """The model configuration of a GGUF file, without the weights."""
    return _read_config(open_gguf(path))[1]


def end_tokens(file: GGUFFile) -> dict:
    """The part of generation_config.json with all tokens that end a text or a turn."""
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(file.metadata[name] for name in names if name in file.metadata))
    return {"eos_token_id": ids} if len(ids) > 1 else {}


def open_gguf(path) -> GGUFModel:
    """Opens a file; no tensor is read yet.

    Raises:
      ModelLoadError: see `read_gguf` and `hugging_face_fields`.
    """
    file = read_gguf(path)
    fields = hugging_face_fields(file)
    modules = FOUR_NORMS if architecture_of(file).gemma else MODULES
    names: dict[str, tuple[str, int | None]] = {}
    for name in file.tensors.keys() - {ROPE_FREQS}:
        ours = _name(name, modules)
        experts: Iterable[int | None] = [None]
        if ours != name and "{}" in ours:
            experts = range(file.tensors[name].shape[0])
        for expert in experts:
            full = ours if expert is None else ours.format(expert)
            if full in names:
                raise ModelLoadError(f"{file.path}: two tensors are {join_some([full])}.")
            names[full] = name, expert
    return GGUFModel(file, fields, names)


def _read_config(source: GGUFModel) -> tuple[Family, TransformerConfig]:
    where = str(source.file.path)
    family = family_of(source.fields["model_type"], where)
    return family, family.from_hugging_face(source.fields, where)


def _check_tensors(source: GGUFModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are missing, extra or misshapen."""
    problems = [f"{name} is missing" for name in shapes.keys() - source.names.keys()]
    problems += [
        f"{source.names[name][0]} is not in the architecture"
        for name in source.names.keys() - shapes.keys()
    ]
    problems += [
        f"{source.names[name][0]} has shape {source.shape(name)}, expected {shape}"
        for name, shape in shapes.items()
        if name in source.names and source.shape(name) != shape
    ]
    if problems:
        raise ModelLoadError(
            f"tensors of {source.file.path}: {join_some(sorted(problems), separator='; ')}."
        )


def _name(name: str, modules: Mapping[str, str]) -> str:
    """The Hugging Face name of a tensor in llama.cpp's naming; an unknown name is kept.

    >>> _name("blk.3.attn_q.weight", MODULES)
    'model.layers.3.self_attn.q_proj.weight'
    """
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None or found[2] not in modules:
        return TOP.get(name, name)
    return f"model.layers.{found[1]}.{modules[found[2]]}.{found[3]}"


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from interleaved rotary pairs to halves.

    >>> _halves(np.arange(8), heads=2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
