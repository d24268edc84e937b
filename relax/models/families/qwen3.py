"""Qwen 3: Qwen 2 with norms of each query and key in place of biases."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, HIDDEN_ACT, common
from relax.models.families.qwen2 import WINDOWS

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={
        **common(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            num_key_value_heads=32,
            head_dim=128,
        ),
        **WINDOWS,
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
    },
    fixed={"qk_norm": "head"},
    derive=windows.from_layer,
    restore=windows.to_layer,
)
