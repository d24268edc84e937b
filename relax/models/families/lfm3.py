"""LFM3: LFM2 with windows, norms after the blocks, and a gate for each head of attention."""

from relax.models.config import TransformerConfig
from relax.models.families import lfm2
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    FLAG,
    SIZE,
    Field,
    common,
    derived,
    lists,
    words,
)
from relax.models.families.rope import PARTIAL, RopeFields
from relax.models.families.windows import FULL, SLIDING


def derive(values: dict) -> dict:
    """Of four layers the third is full, the first has a window, unless `layer_types` is set.

    The first layer of all has a convolution instead.
    """
    count, types = values["num_hidden_layers"], values["layer_types"]
    if types is None:
        turns = (SLIDING, lfm2.CONV, FULL, lfm2.CONV)
        types = tuple(turns[i % 4] if i else lfm2.CONV for i in range(count))
    return {
        "layer_types": types,
        "sliding_window": values["sliding_window"] if SLIDING in types else None,
        "attention_gate": "head" if values["use_attention_gate"] else None,
    }


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    return {
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "use_attention_gate": config.attention_gate is not None,
    }


_FIELDS = common(
    max_position_embeddings=128000,
    rms_norm_eps=1e-5,
    num_key_value_heads=4,
    head_dim=128,
    tie_word_embeddings=True,
)
del _FIELDS["rms_norm_eps"]
FAMILY = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    fields={
        **_FIELDS,
        "norm_eps": lfm2.FAMILY.fields["norm_eps"],
        "conv_bias": Field(FLAG, False),
        "conv_L_cache": Field(lfm2.WIDTH, 7, ("conv_width",)),
        "attention_bias": ATTENTION_BIAS,
        "use_sandwich_norm": Field(FLAG, True, ("post_norm",)),
        "use_attention_gate": derived(FLAG, True),
        "sliding_window": derived(SIZE, 256, null=True),
        "layer_types": derived(lists(words(lfm2.CONV, FULL, SLIDING)), None),
    },
    fixed={"qk_norm": "head"},
    derive=derive,
    restore=restore,
    rope=RopeFields(
        theta=1e6,
        kinds=("default", "linear", "proportional", "llama3", "yarn"),
        by_type=True,
        local_theta=1e6,
        absent=(("rope_type", "proportional"), (PARTIAL, 0.5)),
        absent_local=(("rope_theta", 1e4),),
        nested_only=True,
    ),
    names={
        "attention_norm": "operator_norm",
        "post_attention_norm": "post_operator_norm",
        "mlp_norm": "ffn_norm",
        "post_mlp_norm": "post_ffn_norm",
        "g_proj": "self_attn.gate_proj",
        "gate_proj": "feed_forward.w1",
        "up_proj": "feed_forward.w3",
        "down_proj": "feed_forward.w2",
        "norm/scale": "model.embedding_norm.weight",
    },
    also_named=({"g_proj": "self_attn.g_proj"},),
)
