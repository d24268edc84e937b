"""Llama 2 and 3, SmolLM2 and kin: configuration and tensor names, as data."""

from relax.errors import ModelLoadError
from relax.models.config import RopeScaling, TransformerConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

# Fields with the same name and meaning here and there. None: config.json must have it.
SAME = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}

# Fields that would change the computation in a way we do not have, and the values we do have.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}

# Fields that do not change what the weights compute for given tokens.
HARMLESS = """
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    dtype eos_token_id finetuning_task head_dim id2label is_decoder is_llama_config keys_to_ignore_at_inference
    label2id model_type num_key_value_heads output_attentions output_hidden_states pad_token_id prefix
    pretraining_tp problem_type return_dict rope_interleaved rope_parameters rope_scaling rope_theta
    sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype
    torchscript transformers_version transformers.js_config unk_token_id use_bfloat16 use_cache
""".split()  # fmt: skip  # noqa: E501

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
TOP = {
    ("embed_tokens",): "model.embed_tokens.weight",
    ("lm_head",): "lm_head.weight",
    ("norm", "scale"): "model.norm.weight",
}


def from_hugging_face(fields: dict, where: str = "config.json") -> TransformerConfig:
    """Reads config.json; an unknown field, or one whose value we do not compute, is refused."""
    known = {*SAME, *ONLY, *HARMLESS}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ModelLoadError(
            f"{where}: fields that ReLax does not know, and so cannot honour: {', '.join(unknown)}."
        )
    for name, values in ONLY.items():
        if name in fields and fields[name] not in values:
            raise ModelLoadError(
                f"{where}: {name} is {fields[name]!r}, which is not implemented; only "
                f"{' or '.join(map(repr, values))} is."
            )
    if fields.get("rope_interleaved"):
        raise ModelLoadError(f"{where}: rope_interleaved is true, which is not implemented.")
    missing = [name for name, default in SAME.items() if default is None and name not in fields]
    if missing:
        raise ModelLoadError(f"{where}: missing fields: {', '.join(missing)}.")
    heads = fields["num_attention_heads"]
    rope = _rope(fields)
    return TransformerConfig(
        **{name: fields.get(name, default) for name, default in SAME.items()},
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_scaling(rope, where),
    )


def to_hugging_face(config: TransformerConfig) -> dict:
    """What config.json holds for a model of this family."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {name: getattr(scaling, name) for name in _LLAMA3}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in SAME},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_parameters": rope,
    }


def tensor_name(path: tuple[str, ...]) -> str:
    """Path in our params -> name in the file.

    >>> tensor_name(("layers_3", "q_proj", "kernel"))
    'model.layers.3.self_attn.q_proj.weight'
    """
    if path in TOP:
        return TOP[path]
    layer, module, leaf = path
    block = "self_attn." if module in ATTENTION else "mlp." if module.endswith("_proj") else ""
    return f"model.layers.{layer.removeprefix('layers_')}.{block}{module}.{LEAVES[leaf]}"


_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(fields: dict) -> dict:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before."""
    old = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
    return old | (fields.get("rope_scaling") or {}) | (fields.get("rope_parameters") or {})


def _scaling(rope: dict, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(kind, float(rope["factor"]), **{name: rope[name] for name in _LLAMA3})
    raise ModelLoadError(
        f"{where}: rope_type is {kind!r}, which is not implemented; only default, linear and "
        "llama3 are."
    )
