"""Seed-OSS: Llama with a bias switch for queries, keys and values, and one for outputs."""

from relax.models.families.family import Family
from relax.models.families.fields import FLAG, HIDDEN_ACT, Field, common

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    fields={
        **common(
            max_position_embeddings=524288,
            rms_norm_eps=1e-6,
            num_key_value_heads=8,
            head_dim=128,
        ),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": Field(FLAG, True),
        "attention_out_bias": Field(FLAG, False, ("output_bias",)),
        "mlp_bias": Field(FLAG, False),
    },
    # Without these fields transformers trains with a dropout of 0.1.
    restore=lambda config: {"attention_dropout": 0.0, "residual_dropout": 0.0},
)
