"""Gemma 2: norms before and after each block, soft caps, a window on every other layer."""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    GATES,
    LAYER_TYPES,
    POSITIVE,
    SIZE,
    Field,
    common,
    derived,
)

FIELDS = {
    **common(
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
    ),
    "hidden_activation": Field(GATES, "gelu_pytorch_tanh", ("hidden_act",)),
    "attention_bias": ATTENTION_BIAS,
    "query_pre_attn_scalar": derived(SIZE, 256),
    "sliding_window": derived(SIZE, 4096, null=True),
    "layer_types": derived(LAYER_TYPES, None),
    "final_logit_softcapping": Field(POSITIVE, 30.0, null=True),
    "attn_logit_softcapping": Field(POSITIVE, 50.0, null=True),
}
FIXED = {"norm_plus_one": True, "post_norm": True}
NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def scales(values: dict) -> dict:
    """The factors of the embeddings, and of queries times keys."""
    return {
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "attention_multiplier": values["query_pre_attn_scalar"] ** -0.5,
    }


def derive(values: dict) -> dict:
    """Every other layer is full, the first has a window."""
    return scales(values) | windows.in_turns(values, 2)


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    multiplier = config.attention_multiplier or config.head_dim**-0.5
    return {
        "query_pre_attn_scalar": round(multiplier**-2),
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=FIELDS,
    fixed=FIXED,
    derive=derive,
    restore=restore,
    only={"use_bidirectional_attention": (False,)},
    repeats={"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    names=NAMES,
)
