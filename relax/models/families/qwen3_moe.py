"""Qwen 3 with a mixture of experts in some layers or in all."""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import STACKED_EXPERTS, Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    EXPERTS,
    FLAG,
    HIDDEN_ACT,
    NOT_NEGATIVE,
    SIZE,
    Field,
    common,
    derived,
    integers,
    lists,
)


def derive(values: dict) -> dict:
    """Every `decoder_sparse_step`-th layer has experts, except for `mlp_only_layers`."""
    first = values["max_window_layers"]
    if values["use_sliding_window"] and first:
        raise ValueError(
            f"max_window_layers is {first} beside use_sliding_window, which is not implemented; "
            "only 0 is."
        )
    window = values["sliding_window"] if values["use_sliding_window"] else None
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"]
    layers = range(values["num_hidden_layers"])
    return windows.everywhere(values | {"sliding_window": window}) | {
        "dense_layers": tuple(i for i in layers if i in dense or (i + 1) % step)
    }


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(config.dense_layers),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields={
        **common(max_position_embeddings=32768, rms_norm_eps=1e-6, num_key_value_heads=4),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
        "use_sliding_window": derived(FLAG, False),
        "sliding_window": derived(SIZE, 4096, null=True),
        "max_window_layers": derived(integers(0, 2**24 - 1), 0),
        "decoder_sparse_step": derived(SIZE, 1),
        "mlp_only_layers": derived(lists(integers(0, 2**12)), ()),
        "moe_intermediate_size": Field(SIZE, 768),
        "num_experts": Field(EXPERTS, 128),
        "num_experts_per_tok": Field(EXPERTS, 8),
        "norm_topk_prob": Field(FLAG, False),
        "router_aux_loss_coef": Field(NOT_NEGATIVE, 0.001),
    },
    fixed={"qk_norm": "head"},
    derive=derive,
    restore=restore,
    aliases={"num_local_experts": "num_experts"},
    also_named=(STACKED_EXPERTS,),
)
