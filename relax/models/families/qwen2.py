"""Qwen 2 and 2.5: biases of queries, keys and values, and a window on the later layers."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import (
    FLAG,
    HIDDEN_ACT,
    LAYER_TYPES,
    SIZE,
    common,
    derived,
    integers,
)

WINDOWS = {
    "use_sliding_window": derived(FLAG, False),
    "sliding_window": derived(SIZE, 4096, null=True),
    "max_window_layers": derived(integers(0, 2**24 - 1), 28),
    "layer_types": derived(LAYER_TYPES, None),
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields={
        **common(max_position_embeddings=32768, rms_norm_eps=1e-6, num_key_value_heads=32),
        **WINDOWS,
        "hidden_act": HIDDEN_ACT,
    },
    fixed={"attention_bias": True},
    derive=windows.from_layer,
    restore=windows.to_layer,
    only={"use_mrope": (False,)},
)
