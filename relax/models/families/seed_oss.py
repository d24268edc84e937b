"""Seed-OSS: Llama with a bias switch for queries, keys and values, and one for outputs."""

import warnings

from relax.models.families.family import Family
from relax.models.families.fields import FLAG, HIDDEN_ACT, Field, Kind, common, derived, is_number

RATE = Kind("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1, float)
DROPOUTS = ("attention_dropout", "residual_dropout")


def derive(values: dict) -> dict:
    """Warns of dropout, which these files ask for, and which changes training alone."""
    rates = [f"{name} {values[name]}" for name in DROPOUTS if values[name]]
    if rates:
        warnings.warn(
            f"{' and '.join(rates)} of config.json will not be applied: ReLax trains without "
            "dropout, except that of adapters.",
            stacklevel=6,
        )
    return {}


FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    fields={
        **common(
            max_position_embeddings=524288,
            rms_norm_eps=1e-6,
            num_key_value_heads=8,
            head_dim=128,
        ),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": Field(FLAG, True),
        "attention_out_bias": Field(FLAG, False, ("output_bias",)),
        "mlp_bias": Field(FLAG, False),
        **dict.fromkeys(DROPOUTS, derived(RATE, 0.1)),
    },
    derive=derive,
    restore=lambda config: dict.fromkeys(DROPOUTS, 0.0),
)
