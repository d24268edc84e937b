"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np

COMMON = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
SIZES = {
    "vocab_size": 61,
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
}
WIDE = {"attention.key_length": 256, "attention.value_length": 256}
# general.architecture -> what config.json and what the file's metadata say of the same model.
CASES = {
    "llama": (
        {"model_type": "llama", **COMMON, "rope_theta": 500.0},
        {**SIZES, "rope.dimension_count": 16},
    ),
    "qwen2": (
        {"model_type": "qwen2", **COMMON, "rope_theta": 500.0, "tie_word_embeddings": True},
        SIZES,
    ),
    "qwen3": (
        {"model_type": "qwen3", **COMMON, "rope_theta": 500.0, "head_dim": 128},
        {**SIZES, "attention.key_length": 128, "attention.value_length": 128},
    ),
    "qwen3moe": (
        {
            **{"model_type": "qwen3_moe", **COMMON, "rope_theta": 500.0, "head_dim": 32},
            **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "norm_topk_prob": True,
        },
        {
            **{**SIZES, "attention.key_length": 32, "expert_count": 5, "expert_used_count": 2},
            "expert_feed_forward_length": 32,
        },
    ),
    "gemma2": (
        {
            **{"model_type": "gemma2", **COMMON, "rope_theta": 10000.0, "head_dim": 256},
            **{"sliding_window": 5, "query_pre_attn_scalar": 256},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            **{key: value for key, value in SIZES.items() if key != "rope.freq_base"},
            **{**WIDE, "attention.sliding_window": 5},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
    ),
    "gemma3": (
        {
            **{"model_type": "gemma3_text", **COMMON, "num_hidden_layers": 6, "head_dim": 256},
            **{"rope_theta": 500.0, "rope_local_base_freq": 10000.0, "sliding_window": 5},
            "query_pre_attn_scalar": 256,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        {**SIZES, **WIDE, "block_count": 6, "attention.sliding_window": 5},
    ),
}


def convert(architecture: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face's names -> by llama.cpp's, changed as its converter changes them."""
    fields = CASES[architecture][0]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, fields["num_hidden_layers"])
    converted = {}
    for name, array in sorted(tensors.items()):
        if architecture == "llama" and "q_proj" in name:
            array = interleave(array, fields["num_attention_heads"])
        if architecture == "llama" and "k_proj" in name:
            array = interleave(array, fields["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if ".experts." in name:  # all of a layer in one
            name, _, expert = name.partition(".experts.")
            expert, _, name_after = expert.partition(".")
            name = f"{name}.experts.{name_after}"
            array = np.stack([*converted.get(_theirs(names, name), ()), array])
        converted[_theirs(names, name)] = array
    return converted


def _theirs(names, name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    return f"{names.get_name(stem)}.{leaf}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head goes to 2 i, row i of the second half to 2 i + 1."""
    turned = np.empty_like(array)
    size = array.shape[0] // heads
    for row in range(array.shape[0]):
        head, i = divmod(row, size)
        to = 2 * i if i < size // 2 else 2 * (i - size // 2) + 1
        turned[head * size + to] = array[row]
    return turned


def write(path: Path, architecture: str, metadata: dict, tensors: dict, kind: str = "F32") -> Path:
    """Writes a file.

    Args:
      path: of it.
      architecture: in `general.architecture`.
      metadata: keys of the architecture without its name, and others with a `tokenizer` or so.
      tensors: by llama.cpp's names; matrices become of the type `kind`, others F32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        whole = key.startswith(("tokenizer.", "general.", "split.", "other."))
        key = key if whole else f"{architecture}.{key}"
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds |= {str: writer.add_string, list: writer.add_array}
        kinds[type(value)](key, value)
    for name, array in tensors.items():
        type_ = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
