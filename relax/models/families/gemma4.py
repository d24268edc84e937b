"""Gemma 4 without experts: E2B, E4B and 31B.

Full layers have wider heads than those with a window, and turn a quarter of their planes. The last
layers have no keys and values of their own. Tokens have an input of their own for each layer.
"""

from relax.models.config import TransformerConfig
from relax.models.families import windows
from relax.models.families.family import Family
from relax.models.families.fields import (
    ATTENTION_BIAS,
    FLAG,
    GATES,
    LAYER_TYPES,
    POSITIVE,
    SIZE,
    Field,
    Kind,
    common,
    derived,
    integers,
)
from relax.models.families.gemma2 import NAMES
from relax.models.families.rope import PARTIAL, RopeFields
from relax.models.families.windows import FULL, SLIDING

HEADS, KV_HEADS = "head_dim", "num_key_value_heads"
WINDOW = 512
OVERRIDES = Kind(
    "an object of objects by the numbers of layers",
    lambda value: (
        isinstance(value, dict)
        and all(key.isdecimal() and isinstance(one, dict) for key, one in value.items())
    ),
    lambda value: {int(key): one for key, one in value.items()},
)


def derive(values: dict) -> dict:
    """Five of six layers have a window, unless `layer_types` is set; the last one is full."""
    count = values["num_hidden_layers"]
    types = tuple(SLIDING if (i + 1) % 6 and i + 1 < count else FULL for i in range(count))
    ours = windows.of_types(values, types, values["sliding_window"])
    types = ours["layer_types"] or (FULL,) * count
    if types[-1] != FULL:
        raise ValueError(
            f"layer_types must end in {FULL}, as which transformers takes the last layer in any "
            f"case, got {types[-1]}."
        )
    head_dim, kv_heads = _of_full_layers(values, types)
    return ours | {
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "global_head_dim": None if head_dim == values[HEADS] else head_dim,
        "num_global_key_value_heads": None if kv_heads == values[KV_HEADS] else kv_heads,
    }


def _of_full_layers(values: dict, types: tuple[str, ...]) -> tuple[int, int]:
    """Width of heads and number of key-value heads, in either of the two forms of config.json."""
    overrides, apart = values["per_layer_config"], values["num_global_key_value_heads"]
    if apart is not None and not values["attention_k_eq_v"]:
        raise ValueError(
            f"num_global_key_value_heads is {apart} without attention_k_eq_v, where transformers "
            "ignores it: remove it."
        )
    head_dim, kv_heads = values["global_head_dim"], apart or values[KV_HEADS]
    if overrides is None:
        return head_dim or 512, kv_heads
    found: dict[str, set] = {FULL: set(), SLIDING: set()}
    for i, kind in enumerate(types):
        own = overrides.get(i, {})
        unknown = sorted(own.keys() - {HEADS, KV_HEADS})
        if unknown:
            raise ValueError(
                f"per_layer_config sets {', '.join(unknown)} of layer {i}, which is not "
                f"implemented; only {HEADS} and {KV_HEADS} are."
            )
        found[kind].add(tuple(own.get(name, values[name]) for name in (HEADS, KV_HEADS)))
    plain = (values[HEADS], values[KV_HEADS])
    if found[SLIDING] - {plain} or len(found[FULL]) > 1 or max(overrides, default=0) >= len(types):
        raise ValueError(
            "per_layer_config must be about the full layers of layer_types alone, and the same for "
            f"all of them, got {repr(overrides)[:80]}."
        )
    ((width, number),) = found[FULL]
    if number != values[KV_HEADS] and not values["attention_k_eq_v"]:
        raise ValueError(
            f"per_layer_config sets {KV_HEADS} without attention_k_eq_v, which is not implemented."
        )
    if head_dim not in (None, width) or apart not in (None, number):
        raise ValueError(
            "per_layer_config disagrees with global_head_dim or num_global_key_value_heads, got "
            f"{width} and {head_dim}, {number} and {apart}."
        )
    return width, number


def restore(config: TransformerConfig) -> dict:
    """The inverse of `derive`, in the form of the models' own files."""
    return {
        "layer_types": list(windows.types_of(config)),
        "sliding_window": config.sliding_window or WINDOW,  # transformers takes no null
        "global_head_dim": config.global_head_dim or config.head_dim,
        "num_global_key_value_heads": config.num_global_key_value_heads,
    }


def unread(config: TransformerConfig) -> frozenset[str]:
    """The keys and values of layers that use those of another, which real files still hold."""
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "k_proj.bias", "v_proj.bias")
    return frozenset(
        f"model.layers.{i}.self_attn.{name}"
        for i, layer in enumerate(config.layers)
        if layer.source is not None
        for name in names
    )


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    fields={
        **common(
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            head_dim=256,
            tie_word_embeddings=True,
        ),
        "hidden_activation": Field(GATES, "gelu_pytorch_tanh", ("hidden_act",)),
        "attention_bias": ATTENTION_BIAS,
        "final_logit_softcapping": Field(POSITIVE, None, null=True),
        "sliding_window": derived(SIZE, WINDOW),
        "layer_types": derived(LAYER_TYPES, None),
        "global_head_dim": derived(SIZE, None),
        "num_global_key_value_heads": derived(SIZE, None),
        "per_layer_config": derived(OVERRIDES, None),
        "attention_k_eq_v": Field(FLAG, False),
        "num_kv_shared_layers": Field(integers(0, 2**12 - 1), 0),
        "use_double_wide_mlp": Field(FLAG, False),
        "hidden_size_per_layer_input": Field(integers(0, 2**24 - 1), 256),
        "vocab_size_per_layer_input": Field(integers(0, 2**24 - 1), 262144),
    },
    fixed={
        "post_norm": True,
        "qk_norm": "head",
        "value_norm": True,
        "attention_multiplier": 1.0,
        "layer_scalar": True,
    },
    derive=derive,
    restore=restore,
    rope=RopeFields(
        theta=1e6,
        kinds=("default", "proportional"),
        by_type=True,
        local_theta=1e4,
        absent=(("rope_type", "proportional"), (PARTIAL, 0.25)),
        nested_only=True,
    ),
    only={
        "use_bidirectional_attention": ("vision",),  # of images, not of text
        "enable_moe_block": (False,),
        "num_experts": (),
        "top_k_experts": (),
        "moe_intermediate_size": (),
        "expert_intermediate_size": (),
    },
    names=NAMES,
    unread=unread,
)
