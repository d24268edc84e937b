"""Qwen 3.5 to 3.8, dense: gated delta rules in three of four layers, gated attention in the other.

Norms multiply by 1 + weight. A quarter of each head turns; images would turn its planes by other
positions (`mrope_section`), text turns all of them by its own.
"""

from relax.models.config import TransformerConfig
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    HIDDEN_ACT,
    SIZE,
    Field,
    common,
    derived,
    integers,
    lists,
    words,
)
from relax.models.families.rope import RopeFields

DELTA, FULL = "linear_attention", "full_attention"


def derive(values: dict) -> dict:
    """Every `full_attention_interval`-th layer is full, unless `layer_types` is set."""
    count, step = values["num_hidden_layers"], values["full_attention_interval"]
    types = values["layer_types"]
    if types is None:
        types = tuple(DELTA if (i + 1) % step else FULL for i in range(count))
    return {"layer_types": types}


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    return {"layer_types": list(config.layer_types)}


FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    fields={
        **common(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            head_dim=256,
        ),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
        "linear_conv_kernel_dim": Field(integers(1, 64), 4, ("conv_width",)),
        "linear_key_head_dim": Field(SIZE, 128),
        "linear_value_head_dim": Field(SIZE, 128),
        "linear_num_key_heads": Field(SIZE, 16),
        "linear_num_value_heads": Field(SIZE, 32),
        "layer_types": derived(lists(words(DELTA, FULL)), None),
        "full_attention_interval": derived(SIZE, 4),
    },
    fixed={"qk_norm": "head", "norm_plus_one": True, "attention_gate": "entry"},
    derive=derive,
    restore=restore,
    rope=RopeFields(partial=0.25, ignored=("mrope_section", "mrope_interleaved")),
    # In transformers the gate of full layers is a sigmoid and that of delta rules silu, also of
    # the files that say swish.
    only={
        "output_gate_type": ("swish",),
        "attn_output_gate": (True,),
        "mamba_ssm_dtype": ("float32",),
        "mlp_only_layers": ([],),
    },
    # Of the layers that predict further tokens, which files keep under `mtp.`.
    harmless=frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
    names={"out_proj": "linear_attn.out_proj"},
)
