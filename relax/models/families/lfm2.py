"""LFM2: short gated convolutions in most layers, attention with norms of heads in the others."""

from relax.models.config import TransformerConfig
from relax.models.families.family import Family
from relax.models.families.fields import (
    FLAG,
    POSITIVE,
    SIZE,
    Field,
    common,
    derived,
    integers,
    lists,
    words,
)
from relax.models.families.rope import RopeFields

CONV, FULL = "conv", "full_attention"
WIDTH = integers(1, 64)  # of the convolution's kernels
INDICES = lists(integers(0, 2**12 - 1))


def derive(values: dict) -> dict:
    """Types of layers, and the width of the feed-forward block after its adjustment."""
    count, types = values["num_hidden_layers"], values["layer_types"]
    attends = values["full_attn_idxs"]
    if types is None:
        chosen = range(count) if attends is None else attends
        types = tuple(FULL if i in chosen else CONV for i in range(count))
    elif attends is not None and {i for i, kind in enumerate(types) if kind == FULL} != {*attends}:
        raise ValueError("layer_types and full_attn_idxs disagree about the layers with attention.")
    return {"layer_types": types, "intermediate_size": _adjusted(values)}


def _adjusted(values: dict) -> int:
    width, multiple = values["intermediate_size"], values["block_multiple_of"]
    if not values["block_auto_adjust_ff_dim"]:
        return width
    width = int(values["block_ffn_dim_multiplier"] * int(2 * width / 3))
    return -(-width // multiple) * multiple


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`; the width is that after the adjustment."""
    return {
        "layer_types": list(config.layer_types),
        "intermediate_size": config.intermediate_size,
        "block_auto_adjust_ff_dim": False,
    }


_FIELDS = common(
    max_position_embeddings=128000,
    rms_norm_eps=1e-5,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
del _FIELDS["rms_norm_eps"], _FIELDS["intermediate_size"]
FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    fields={
        **_FIELDS,
        "norm_eps": Field(POSITIVE, 1e-5, ("rms_norm_eps",)),
        "conv_bias": Field(FLAG, False),
        "conv_L_cache": Field(WIDTH, 3, ("conv_width",)),
        "intermediate_size": derived(SIZE, 12288),
        "layer_types": derived(lists(words(CONV, FULL)), None),
        "full_attn_idxs": derived(INDICES, None),
        "block_multiple_of": derived(SIZE, 256),
        "block_ffn_dim_multiplier": derived(POSITIVE, 1.0),
        "block_auto_adjust_ff_dim": derived(FLAG, True),
    },
    fixed={"qk_norm": "head"},
    derive=derive,
    restore=restore,
    rope=RopeFields(theta=1e6),
    # Of the models' own code; they repeat other fields, or are about initial weights.
    aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    repeats={
        "block_dim": "hidden_size",
        "conv_dim": "hidden_size",
        "conv_dim_out": "hidden_size",
        "num_heads": "num_attention_heads",
        "block_norm_eps": "norm_eps",
    },
    only={"block_use_swiglu": (True,), "use_pos_enc": (True,)},
    harmless=frozenset(
        """
        block_mlp_init_scale block_out_init_scale block_use_xavier_init conv_use_xavier_init theta
        """.split()
    ),
    names={
        "attention_norm": "operator_norm",
        "mlp_norm": "ffn_norm",
        "o_proj": "self_attn.out_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "gate_proj": "feed_forward.w1",
        "up_proj": "feed_forward.w3",
        "down_proj": "feed_forward.w2",
        "norm/scale": "model.embedding_norm.weight",
    },
)
