"""Granite 3: Llama whose embeddings, attention, residual branches and logits have factors."""

from relax.models.config import TransformerConfig
from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, FLAG, HIDDEN_ACT, POSITIVE, Field, common

FACTORS = {
    name: Field(POSITIVE, 1.0)
    for name in (
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
    )
}


def restore(config: TransformerConfig) -> dict:
    """The factor of queries times keys, which is 1 where the file has none."""
    return {"attention_multiplier": config.attention_multiplier or config.head_dim**-0.5}


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-6),
        **FACTORS,
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": Field(FLAG, False),
    },
    restore=restore,
)
