"""Ministral 3: Mistral whose queries grow with their positions, with rope YaRN."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import HIDDEN_ACT, LAYER_TYPES, SIZE, common, derived
from relax.models.families.rope import RopeFields

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

FAMILY = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    fields={
        **common(
            max_position_embeddings=262144,
            rms_norm_eps=1e-5,
            num_key_value_heads=8,
            head_dim=128,
        ),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, None, null=True),
        "layer_types": derived(LAYER_TYPES, None),
    },
    derive=windows.everywhere,
    restore=lambda config: {"sliding_window": config.sliding_window},
    rope=RopeFields(kinds=("default", "yarn"), query_scaling=True, absent=tuple(ROPE.items())),
)
