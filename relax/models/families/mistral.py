"""Mistral: Llama with a window on every layer."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import HIDDEN_ACT, LAYER_TYPES, SIZE, common, derived

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields={
        **common(max_position_embeddings=131072, rms_norm_eps=1e-6, num_key_value_heads=8),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, 4096, null=True),
        "layer_types": derived(LAYER_TYPES, None),
    },
    derive=windows.everywhere,
    restore=lambda config: {"sliding_window": config.sliding_window},
)
