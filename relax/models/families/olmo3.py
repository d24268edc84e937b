"""OLMo 3: OLMo 2 with a window in three of four layers, and scaled rope in the others alone."""

from relax.models.config import TransformerConfig
from relax.models.families import olmo2, windows
from relax.models.families.family import Family
from relax.models.families.fields import LAYER_TYPES, SIZE, derived
from relax.models.families.rope import RopeFields


def derive(values: dict) -> dict:
    """Every fourth layer is full, unless `layer_types` says otherwise."""
    return windows.in_turns(values, 4)


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    return {
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    fields={
        **olmo2.FAMILY.fields,
        "sliding_window": derived(SIZE, 4096, null=True),
        "layer_types": derived(LAYER_TYPES, None),
    },
    fixed=olmo2.FAMILY.fixed,
    derive=derive,
    restore=restore,
    rope=RopeFields(theta=5e5, by_type=True),
    names=olmo2.FAMILY.names,
)
