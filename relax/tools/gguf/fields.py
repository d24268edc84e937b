"""The contents of config.json, from the metadata of a GGUF file.

Source: llama.cpp authors, convert_hf_to_gguf.py and src/models, 2023-2026.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.models.rope import Rope, RopeScaling
from relax.models.rotary import frequencies
from relax.tools.gguf.file import GGUFFile

# Keys of every architecture, after its name, and the corresponding fields of config.json.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
SIZES = tuple(FIELDS)[:5]  # required in every file
SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Keys that are checked elsewhere, or do not affect the computation.
IGNORED_FIELDS = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.finetuned",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
# Keys without effect at these values.
NEUTRAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}

ROPE_FREQS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture, named by `general.architecture`.

    Attributes:
      model_type: its model family.
      fields: its own keys, as in `FIELDS`.
      derive: returns further fields of config.json from `(fields, file)`.
      gemma: layers also have norms after attention and MLP, and norms are stored plus 1.
      interleaved: rows of queries and keys are ordered for interleaved rotary pairs.
    """

    model_type: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derive: Callable[[dict, GGUFFile], dict] = lambda fields, file: {}
    gemma: bool = False
    interleaved: bool = False


def hugging_face_fields(file: GGUFFile) -> dict:
    """The contents of config.json for the model of a file.

    Raises:
      ModelLoadError: the architecture or a key is unknown, or a value is not supported.
    """
    kind, name = architecture_of(file), file.metadata["general.architecture"]
    given = {
        key.removeprefix(f"{name}."): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    table = {**FIELDS, **kind.fields}
    _check_keys(file, given, {*table, *IGNORED_FIELDS, *SCALING})
    fields = {field: given[key] for key, field in table.items() if key in given}
    heads = fields["num_attention_heads"]
    fields.setdefault("num_key_value_heads", heads)
    fields.setdefault("head_dim", fields["hidden_size"] // heads)
    fields.setdefault("rope_theta", 10000.0)
    _check_redundant(file, given, fields["head_dim"])
    fields |= {
        "model_type": kind.model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    scaling = {field: given[key] for key, field in SCALING.items() if key in given}
    fields |= _scaling(file, given.get("rope.scaling.type"), scaling)
    if ROPE_FREQS in file.tensors:
        fields |= _llama3(file, fields)
    return fields | kind.derive(fields, file)


def architecture_of(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: unknown architecture: general.architecture is {repr(name)[:80]}. "
            f"Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[name]


def _check_keys(file: GGUFFile, given: Mapping, known: set[str]) -> None:
    """Refuses unknown keys of the architecture, and missing or invalid sizes."""
    unknown = [
        f"{key} = {repr(value)[:40]}"
        for key, value in given.items()
        if key not in known and NEUTRAL.get(key, ()) != value
    ]
    if unknown:
        raise ModelLoadError(
            f"{file.path}: metadata that ReLax does not know, and so cannot honour: "
            f"{join_some(sorted(unknown))}."
        )
    for key in (*SIZES, "attention.head_count_kv", "attention.key_length"):
        value = given.get(key, None if key in SIZES else 1)
        if not isinstance(value, int) or not 0 < value < 2**24:
            raise ModelLoadError(f"{file.path}: {key} must be a size, got {value!r}.")
    theta = given.get("rope.freq_base", 1.0)
    if not isinstance(theta, float) or not 0 < theta < 1e38:
        raise ModelLoadError(f"{file.path}: rope.freq_base must be above 0, got {theta!r}.")
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: tensor token_embd.weight is missing.")
    for key, wanted in (("general.type", ("model",)), ("split.count", (0, 1))):
        value = file.metadata.get(key, wanted[0])
        if value not in wanted:
            raise ModelLoadError(
                f"{file.path}: {key} is {value!r}: only whole models in one file are read."
            )


def _check_redundant(file: GGUFFile, given: Mapping, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_dim) != head_dim:
            raise ModelLoadError(
                f"{file.path}: {key} is {given[key]}, which is not implemented; only the size of a "
                f"head, {head_dim}, is."
            )


def _shortest(value):
    """The shortest form of a float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(file: GGUFFile, kind: str | None, scaling: dict) -> dict:
    """`rope_scaling` of config.json, from the keys of `SCALING`."""
    if kind is None:
        kind = "linear" if "factor" in scaling else "none"
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(
            f"{file.path}: rope.scaling.type is {kind!r}, which is not implemented; only linear "
            "and yarn are."
        )
    if kind == "linear":
        scaling.pop("original_max_position_embeddings", None)  # which is not used
    return {"rope_scaling": {"rope_type": kind, **scaling}}


def _llama3(file: GGUFFile, fields: Mapping) -> dict:
    """`rope_scaling` of Llama 3, recovered from the file's factor per frequency."""
    held = file.read(ROPE_FREQS)
    if (held == 1).all():
        return {}
    head_dim, theta = fields["head_dim"], fields["rope_theta"]
    scaling = RopeScaling("llama3", factor=float(held.max()))  # as all of Llama 3.1 to 3.3 have it
    if held.shape == (head_dim // 2,):
        plain, stretched = (frequencies(Rope(theta, s), head_dim) for s in (None, scaling))
        if np.allclose(held, np.asarray(plain / stretched), rtol=1e-4, atol=0):
            names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            settings = {name: getattr(scaling, name) for name in names}
            return {"rope_scaling": {"rope_type": "llama3", "factor": scaling.factor, **settings}}
    raise ModelLoadError(
        f"{file.path}: {ROPE_FREQS} holds factors that are not those of Llama 3.1's scaling, and "
        "others are not implemented."
    )


def _llama(fields: dict, file: GGUFFile) -> dict:
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _gemma2(fields: dict, file: GGUFFile) -> dict:
    # llama.cpp's defaults for older files without these keys.
    old = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
    return old | fields | _gemma(fields, period=2, largest=46)


def _gemma3(fields: dict, file: GGUFFile) -> dict:
    fields.setdefault("rope_local_base_freq", 10000.0)
    period = fields.pop("sliding_window_pattern", 6)
    if not isinstance(period, int) or period < 1:
        raise ModelLoadError(
            f"{file.path}: attention.sliding_window_pattern must be a count, got {period!r}."
        )
    return _gemma(fields, period if "sliding_window" in fields else 1, largest=62)


def _gemma(fields: dict, period: int, largest: int) -> dict:
    """Fields of Gemma: every `period`-th layer is full; the largest scales by width / heads."""
    types = ["full_attention", *["sliding_attention"] * (period - 1)]
    layers, scalar = fields["num_hidden_layers"], fields["head_dim"]
    if layers == largest:
        scalar = fields["hidden_size"] // fields["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "layer_types": [types[(i + 1) % period] for i in range(layers)],
    }


_GEMMA2 = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3 = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_QWEN3_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
ARCHITECTURES = {
    "llama": Architecture("llama", derive=_llama, interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", _QWEN3_MOE, lambda *_: {"norm_topk_prob": True}),
    "gemma2": Architecture("gemma2", _GEMMA2, _gemma2, gemma=True),
    "gemma3": Architecture("gemma3_text", _GEMMA3, _gemma3, gemma=True),
}
