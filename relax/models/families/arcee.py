"""Arcee: Llama whose feed-forward block squares rectified inputs, without a gate."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, FLAG, GATES, Field, common

FAMILY = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    fields={
        **common(max_position_embeddings=4096, rms_norm_eps=1e-5),
        "hidden_act": Field(GATES, "relu2"),
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": Field(FLAG, False),
    },
    fixed={"gated_mlp": False},
)
