"""gpt-oss: attention sinks, windows in turns, biases everywhere, experts with clamped gates.

Files hold the experts in MXFP4 or as they are, `[in, out]`, with the outputs of gate and up
projection in turns. They are written as they are, so without `quantization_config`.
"""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import (
    EXPERTS,
    FLAG,
    LAYER_TYPES,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    Field,
    Kind,
    common,
    derived,
)
from relax.models.families.rope import RopeFields

WINDOW = 128
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _is_mxfp4(settings) -> bool:
    known = {"quant_method", "modules_to_not_convert", "dequantize"}
    return (
        isinstance(settings, dict)
        and settings.keys() <= known
        and settings.get("quant_method") == "mxfp4"
    )


def derive(values: dict) -> dict:
    """Every other layer is full, the first has a window."""
    return windows.in_turns(values, 2)


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`; transformers needs a window even where no layer has one."""
    return {
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window or WINDOW,
    }


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    fields={
        **common(
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            num_key_value_heads=8,
            head_dim=64,
        ),
        "intermediate_size": Field(SIZE, ours=("intermediate_size", "moe_intermediate_size")),
        "attention_bias": Field(FLAG, True, ("attention_bias", "output_bias")),
        "sliding_window": derived(SIZE, WINDOW, null=True),
        "layer_types": derived(LAYER_TYPES, None),
        "num_local_experts": Field(EXPERTS, 128, ("num_experts",)),
        "num_experts_per_tok": Field(EXPERTS, 4),
        "router_aux_loss_coef": Field(NOT_NEGATIVE, 0.001),
        "swiglu_alpha": Field(POSITIVE, 1.702),
        "swiglu_limit": Field(POSITIVE, 7.0),
        "quantization_config": derived(Kind("settings of mxfp4", _is_mxfp4), None),
    },
    fixed={"attention_sinks": True, "expert_bias": True},
    derive=derive,
    restore=restore,
    rope=RopeFields(theta=150000.0, absent=tuple(ROPE.items())),
    only={"hidden_act": ("silu",)},
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    # The original length of its rope settings once more, which transformers does not read.
    harmless=frozenset({"initial_context_length"}),
    names={
        "experts/router": "mlp.router.weight",
        "experts/gate_proj": "mlp.experts.gate_up_proj",
        "experts/up_proj": "mlp.experts.gate_up_proj",
        "experts/down_proj": "mlp.experts.down_proj",
    },
    untransposed=frozenset({"experts/gate_proj", "experts/up_proj", "experts/down_proj"}),
    alternating=True,
)
