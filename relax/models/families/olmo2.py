"""OLMo 2: norms after each block instead of before, and norms of all queries and of all keys."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, HIDDEN_ACT, common

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-5),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
    },
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    names={
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
)
