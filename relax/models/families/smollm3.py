"""SmolLM 3: Llama with some layers without positions."""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    FLAG,
    HIDDEN_ACT,
    LAYER_TYPES,
    SIZE,
    Field,
    common,
    derived,
    integers,
    lists,
)
from relax.models.families.rope import RopeFields


def derive(values: dict) -> dict:
    """Layers without positions; with `use_sliding_window` the same layers have a window."""
    count, step = values["num_hidden_layers"], values["no_rope_layer_interval"]
    ropes = values["no_rope_layers"]
    if ropes is None:
        ropes = tuple(int((i + 1) % step != 0) for i in range(count))
    if len(ropes) != count:
        raise ValueError(
            f"no_rope_layers must be about every layer, got {len(ropes)} for {count} layers."
        )
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = (windows.FULL if window is None or rope else windows.SLIDING for rope in ropes)
    without = tuple(i for i, rope in enumerate(ropes) if not rope)
    return {"no_rope_layers": without} | windows.of_types(values, tuple(types), window)


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    layers = range(config.num_hidden_layers)
    return {
        "no_rope_layers": [int(i not in config.no_rope_layers) for i in layers],
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields={
        **common(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": Field(FLAG, False),
        "use_sliding_window": derived(FLAG, False),
        "sliding_window": derived(SIZE, None, null=True),
        "layer_types": derived(LAYER_TYPES, None),
        "no_rope_layers": derived(lists(integers(0, 1)), None),
        "no_rope_layer_interval": derived(SIZE, 4),
    },
    derive=derive,
    restore=restore,
    rope=RopeFields(theta=2e6),
    harmless=frozenset({"max_window_layers"}),
)
