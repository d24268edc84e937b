"""Granite 4 dense models, of the class of its hybrids but without experts and Mamba layers."""

import math

from relax.models.config import TransformerConfig
from relax.models.families import granite
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    HIDDEN_ACT,
    SIZE,
    Field,
    common,
    derived,
    integers,
    lists,
    words,
)

# The names of a layer with attention, in transformers 5 and 4.
TYPES = lists(words("full_attention", attention="full_attention"))


def derive(values: dict) -> dict:
    """All layers have positions, or none has; each has attention, which the file must say."""
    count, types = values["num_hidden_layers"], values["layer_types"]
    if len(types) != count:
        raise ValueError(
            f"layer_types must name every layer, got {len(types)} types for {count} layers."
        )
    without = () if values["position_embedding_type"] == "rope" else tuple(range(count))
    return {"no_rope_layers": without}


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`, and what says that there are no experts."""
    count = config.num_hidden_layers
    return granite.restore(config) | {
        "layer_types": ["attention"] * count,
        "position_embedding_type": None if len(config.no_rope_layers) == count else "rope",
        "num_local_experts": 0,
        "intermediate_size": config.intermediate_size,
        # transformers checks that they divide twice the width, though there is no Mamba layer.
        "mamba_n_heads": math.gcd(128, 2 * config.hidden_size),
    }


_FIELDS = common(max_position_embeddings=2048, rms_norm_eps=1e-6)
FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    fields={
        **{name: field for name, field in _FIELDS.items() if name != "intermediate_size"},
        **granite.FACTORS,
        "shared_intermediate_size": Field(SIZE, 1024, ("intermediate_size",)),
        "num_local_experts": derived(integers(0, 0)),
        "layer_types": derived(TYPES),
        "position_embedding_type": derived(words("rope", "nope"), "nope"),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
    },
    derive=derive,
    restore=restore,
    aliases={"layers_block_type": "layer_types"},
    # Of experts and Mamba layers, which are not there.
    harmless=frozenset(
        """
        intermediate_size num_experts_per_tok router_aux_loss_coef mamba_n_heads mamba_n_groups
        mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
        mamba_proj_bias time_step_limit normalization_function init_method
        """.split()
    ),
    names={
        **dict.fromkeys(("gate_proj", "up_proj"), "shared_mlp.input_linear"),
        "down_proj": "shared_mlp.output_linear",
    },
)
