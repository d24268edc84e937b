"""Llama 2 and 3, SmolLM2 and other models of this architecture."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, FLAG, HIDDEN_ACT, Field, common

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-6),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": Field(FLAG, False),
    },
)
