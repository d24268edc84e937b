"""Llama 2 and 3, SmolLM2 and kin: configuration and tensor names, as data."""

from relax.errors import ModelLoadError
from relax.models.config import RopeScaling, TransformerConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

# Fields with the same name and meaning here and there: what they may be, and the value where
# config.json has none (None: it must have one).
SIZE = range(1, 2**24)  # what real models stay below and no sum of sizes overflows at
SAME = {
    "vocab_size": (SIZE, None),
    "hidden_size": (SIZE, None),
    "intermediate_size": (SIZE, None),
    "num_hidden_layers": (range(1, 2**12), None),
    "num_attention_heads": (SIZE, None),
    "max_position_embeddings": (SIZE, 2048),
    "rms_norm_eps": (float, 1e-6),
    "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False),
    "mlp_bias": (bool, False),
    "initializer_range": (float, 0.02),
}

# Fields that would change the computation in a way we do not have, and the values we do have.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "auto_map": (),  # the model's own code, which is never run
}

# Fields that do not change what the weights compute for given tokens: bookkeeping, and how
# transformers 4 wrote the settings of generation.
HARMLESS = set(
    """
    _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path architectures
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size dtype eos_token_id
    finetuning_task id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id
    max_sequence_length model_type output_attentions output_hidden_states pad_token_id prefix
    pretraining_tp problem_type return_dict sep_token_id task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
    """.split()
)
READ = {"head_dim", "num_key_value_heads", "rope_parameters", "rope_scaling", "rope_theta"}

# What each kind of rope settings holds besides its kind and rope_theta.
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3)}

# Tensors of files from before transformers 4.32, which follow from config.json.
DERIVED = ".self_attn.rotary_emb.inv_freq"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
TOP = {
    ("embed_tokens",): "model.embed_tokens.weight",
    ("lm_head",): "lm_head.weight",
    ("norm", "scale"): "model.norm.weight",
}


def from_hugging_face(fields: dict, where: str = "config.json") -> TransformerConfig:
    """Reads config.json; an unknown field, or one whose value we do not compute, is refused.

    A field that is null counts as absent.
    """
    unknown = sorted(set(fields) - {*SAME, *ONLY, *READ} - HARMLESS)
    if unknown:
        raise ModelLoadError(
            f"{where}: fields that ReLax does not know, and so cannot honour: {', '.join(unknown)}."
        )
    fields = {name: value for name, value in fields.items() if value is not None}
    missing = [
        name for name, (_, default) in SAME.items() if default is None and name not in fields
    ]
    if missing:
        raise ModelLoadError(f"{where}: missing fields: {', '.join(missing)}.")
    rope = _rope(fields, where)
    for place in (fields, rope):
        _check_only(place, where)
    same = {
        name: _value(fields, name, kind, where, default) for name, (kind, default) in SAME.items()
    }
    heads = same["num_attention_heads"]
    if "head_dim" not in fields and same["hidden_size"] % heads:
        raise ModelLoadError(
            f"{where}: num_attention_heads must divide hidden_size where there is no head_dim, got "
            f"{heads} and {same['hidden_size']}."
        )
    try:
        return TransformerConfig(
            **same,
            output_bias=same["attention_bias"],
            num_key_value_heads=_value(fields, "num_key_value_heads", SIZE, where, heads),
            head_dim=_value(fields, "head_dim", SIZE, where, same["hidden_size"] // heads),
            rope_theta=_value(rope, "rope_theta", float, where, 10000.0),
            rope_scaling=_scaling(rope, where, same["max_position_embeddings"]),
        )
    except ValueError as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{where}: {error}") from None


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
    module = NORMS.get(module, module)
    block = "self_attn." if module in ATTENTION else "mlp." if module.endswith("_proj") else ""
    return f"model.layers.{layer.removeprefix('layers_')}.{block}{module}.{LEAVES[leaf]}"


def _check_only(fields: dict, where: str) -> None:
    for name in ONLY.keys() & fields.keys():
        if fields[name] not in ONLY[name]:
            values = " or ".join(map(repr, ONLY[name]))
            raise ModelLoadError(
                f"{where}: {name} is {repr(fields[name])[:80]}, which is not implemented; only "
                f"{values or 'its absence'} is."
            )


def _value(fields: dict, name: str, kind, where: str, default=None):
    """A field that is a bool, a positive float, or an integer in the range `kind`."""
    value = fields.get(name, default)
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, wanted = number and 0 < value < 1e38, "a finite number above 0"
    else:
        fits = isinstance(value, int) and not isinstance(value, bool) and value in kind
        wanted = f"an integer from {kind[0]} to {kind[-1]}"
    if not fits:
        got = "none" if value is None else repr(value)
        raise ModelLoadError(f"{where}: {name} must be {wanted}, got {got[:80]}.")
    return float(value) if kind is float else value


def _rope(fields: dict, where: str) -> dict:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before."""
    rope = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.get(name, {})
        if not isinstance(inner, dict):
            raise ModelLoadError(f"{where}: {name} must be an object, got {repr(inner)[:80]}.")
        rope |= {key: value for key, value in inner.items() if value is not None}
    rope.setdefault("rope_type", rope.pop("type", "default"))  # `type` before transformers 4.43
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE:
        raise ModelLoadError(
            f"{where}: rope_type is {repr(kind)[:80]}, which is not implemented; only "
            f"{', '.join(ROPE)} are."
        )
    unknown = sorted(rope.keys() - {"rope_type", "type", "rope_theta", *ONLY, *ROPE[kind]})
    if unknown:
        raise ModelLoadError(
            f"{where}: rope settings that ReLax does not know for rope_type {kind!r}: "
            f"{', '.join(unknown)}."
        )
    return rope


def _scaling(rope: dict, where: str, max_position_embeddings: int) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind == "default":
        return None
    factor = _value(rope, "factor", float, where)
    if kind == "linear":
        return RopeScaling(kind, factor)
    low, high = (_value(rope, name, float, where) for name in _LLAMA3[:2])
    if low >= high:
        raise ModelLoadError(
            f"{where}: low_freq_factor must be below high_freq_factor, got {low} and {high}."
        )
    original = _value(rope, _LLAMA3[2], SIZE, where, max_position_embeddings)
    return RopeScaling(kind, factor, low, high, original)
