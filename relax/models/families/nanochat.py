"""nanochat: norms without scales, one of them on the embeddings, and no gates."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, GATES, POSITIVE, Field, common

FAMILY = Family(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-6),
        "hidden_act": Field(GATES, "relu2"),
        "attention_bias": ATTENTION_BIAS,
        "final_logit_softcapping": Field(POSITIVE, 15.0, null=True),
    },
    fixed={
        "gated_mlp": False,
        "norm_scale": False,
        "embedding_norm": True,
        "qk_norm": "rotated",
        "rope_backwards": True,
    },
    names={"up_proj": "mlp.fc1", "down_proj": "mlp.fc2"},
)
