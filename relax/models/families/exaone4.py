"""EXAONE 4: norms after each block, and beside windows no positions in full layers."""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import HIDDEN_ACT, LAYER_TYPES, SIZE, Kind, common, derived
from relax.models.families.olmo2 import FAMILY as OLMO2

PATTERN = Kind(
    "a number of layers, or a word of the letters L and G",
    lambda v: SIZE.fits(v) or isinstance(v, str) and bool(v) and set(v) <= {"L", "G"} or v == 0,
)


def derive(values: dict) -> dict:
    """Beside a `sliding_window`, full layers have no positions."""
    count, window = values["num_hidden_layers"], values["sliding_window"]
    step, given = values["sliding_window_pattern"], values["layer_types"]
    if window is None:
        ours = windows.of_types(values, (windows.FULL,) * count, None)
    elif given is not None:
        ours = windows.of_types(values, given, window)
    elif isinstance(step, str) or not step:
        raise ValueError(
            f"sliding_window_pattern {step!r} beside sliding_window needs layer_types, which name "
            "the type of every layer."
        )
    else:
        ours = windows.in_turns(values, step)
    types = ours["layer_types"] or (windows.FULL,) * count
    full = (i for i, kind in enumerate(types) if kind == windows.FULL)
    return ours | {"no_rope_layers": () if window is None else tuple(full)}


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`; where no layer has positions, `sliding_window` says so alone."""
    alone = 4096 if config.no_rope_layers else None
    return {
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window or alone,
    }


FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-5, num_key_value_heads=32),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, 4096, null=True),
        "sliding_window_pattern": derived(PATTERN, 4),
        "layer_types": derived(LAYER_TYPES, None),
    },
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "head"},
    derive=derive,
    restore=restore,
    names=OLMO2.names,
)
