"""Apertus: no gate, an activation with parameters (xIELU), and norms of queries and keys."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, Field, common, words
from relax.models.families.rope import RopeFields

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ACTIVATIONS = words("xielu", "silu", "gelu", "gelu_pytorch_tanh", "relu2", swish="silu")

FAMILY = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    fields={
        **common(max_position_embeddings=65536, rms_norm_eps=1e-5),
        "hidden_act": Field(ACTIVATIONS, "xielu"),
        "attention_bias": ATTENTION_BIAS,
    },
    fixed={"gated_mlp": False, "qk_norm": "head"},
    rope=RopeFields(theta=12e6, absent=tuple(ROPE.items())),
    only={"mlp_bias": (False,), "qk_norm": (True,), "post_norm": (False,)},
    names={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
)
