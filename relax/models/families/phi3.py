"""Phi 3, 3.5, 4 and 4 mini: fused matrices, a window, and a part of each head that turns."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import HIDDEN_ACT, SIZE, common, derived
from relax.models.families.rope import RopeFields

# The code that came with the files before transformers had its own; it computes the same.
_MODEL = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields={
        **common(max_position_embeddings=4096, rms_norm_eps=1e-5),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, None, null=True),
    },
    derive=windows.everywhere,
    restore=lambda config: {"sliding_window": config.sliding_window},
    rope=RopeFields(
        kinds=("default", "longrope"),
        aliases=(("su", "longrope"), ("yarn", "longrope")),
        partial=True,
        original=4096,
    ),
    only={
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), (0,)),
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,)),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
        "auto_map": (_MODEL, _MODEL | {"AutoTokenizer": "Xenova/gpt-4o"}),
    },
    names={
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
    },
)
