"""Phi 3, 3.5, 4 and 4 mini: fused matrices, a window, and partial rotary positions."""

from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import HIDDEN_ACT, SIZE, Kind, common, derived
from relax.models.families.rope import RopeFields

# Code shipped with the files before transformers supported Phi 3; it computes the same.
_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}


def _is_phi3(auto_map) -> bool:
    """Whether it names only that code; fine-tuned models name the repository too."""
    if not isinstance(auto_map, dict) or not auto_map.keys() <= _CODE.keys():
        return False
    ends = [str(value).split("--") for value in auto_map.values()]
    known = all(end[-1] == _CODE[name] for name, end in zip(auto_map, ends, strict=True))
    return known and all(
        owner.startswith("microsoft/Phi-") for *owners, _ in ends for owner in owners
    )


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields={
        **common(max_position_embeddings=4096, rms_norm_eps=1e-5),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": derived(SIZE, None, null=True),
        "auto_map": derived(Kind("the map to Microsoft's code of Phi 3", _is_phi3), None),
    },
    derive=windows.everywhere,
    restore=lambda config: {"sliding_window": config.sliding_window},
    rope=RopeFields(
        kinds=("default", "longrope"),
        aliases=(("su", "longrope"), ("yarn", "longrope")),
        partial=1.0,
        original=4096,
    ),
    only={
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,)),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
    },
    names={
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
    },
)
