"""GLM-4 (0414): norms around each block, half of each head turns, and its planes are neighbours."""

from relax.models.families.family import Family
from relax.models.families.fields import FLAG, HIDDEN_ACT, Field, common
from relax.models.families.rope import RopeFields

FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    fields={
        **common(
            max_position_embeddings=131072,
            rms_norm_eps=1.5625e-7,
            num_key_value_heads=2,
            head_dim=128,
        ),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": Field(FLAG, True),
    },
    fixed={"post_norm": True, "rope_interleaved": True},
    rope=RopeFields(partial=0.5),
    names={
        "post_attention_norm": "post_self_attn_layernorm",
        "post_mlp_norm": "post_mlp_layernorm",
        **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
    },
)
