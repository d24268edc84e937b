"""Mixtral: Mistral with a mixture of experts in every layer."""

from relax.models.families import windows
from relax.models.families.family import STACKED_EXPERTS, Family
from relax.models.families.fields import (
    EXPERTS,
    HIDDEN_ACT,
    NOT_NEGATIVE,
    SIZE,
    Field,
    common,
    derived,
)
from relax.models.families.rope import RopeFields

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields={
        **common(max_position_embeddings=131072, rms_norm_eps=1e-5, num_key_value_heads=8),
        "intermediate_size": Field(SIZE, ours=("intermediate_size", "moe_intermediate_size")),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, None, null=True),
        "num_local_experts": Field(EXPERTS, 8, ("num_experts",)),
        "num_experts_per_tok": Field(EXPERTS, 2),
        "router_aux_loss_coef": Field(NOT_NEGATIVE, 0.001),
    },
    derive=windows.everywhere,
    restore=lambda config: {"sliding_window": config.sliding_window},
    rope=RopeFields(theta=1e6),
    only={"router_jitter_noise": (0,)},
    aliases={"num_experts": "num_local_experts"},
    names={
        "experts/router": "block_sparse_moe.gate.weight",
        "experts/gate_proj": "block_sparse_moe.experts.{}.w1.weight",
        "experts/up_proj": "block_sparse_moe.experts.{}.w3.weight",
        "experts/down_proj": "block_sparse_moe.experts.{}.w2.weight",
    },
    also_named=(STACKED_EXPERTS,),
)
