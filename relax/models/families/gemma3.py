"""Gemma 3 text models: Gemma 2 with norms of queries and keys instead of soft caps.

Five of six layers have a window and a separate rotary base.
"""

from relax.models.families import gemma2, windows
from relax.models.families.family import Family
from relax.models.families.fields import POSITIVE, SIZE, Field, common, derived
from relax.models.families.rope import RopeFields


def derive(values: dict) -> dict:
    """One layer of `sliding_window_pattern` is full, unless `layer_types` says otherwise."""
    step, private = values["sliding_window_pattern"], values["_sliding_window_pattern"]
    if values["layer_types"] is None and private not in (None, step):
        raise ValueError(
            f"without layer_types, _sliding_window_pattern must be {step}, got {private}."
        )
    return gemma2.scales(values) | windows.in_turns(values, step)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields={
        **{n: f for n, f in gemma2.FIELDS.items() if n != "attn_logit_softcapping"},
        **common(
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            head_dim=256,
            tie_word_embeddings=True,
            vocab_size=262208,  # these two are not in the files of models of images and text
            num_attention_heads=8,
        ),
        "final_logit_softcapping": Field(POSITIVE, None, null=True),
        "sliding_window_pattern": derived(SIZE, 6),
        "_sliding_window_pattern": derived(SIZE, None),
    },
    fixed=gemma2.FIXED | {"qk_norm": "head"},
    derive=derive,
    restore=gemma2.restore,
    rope=RopeFields(theta=1e6, by_type=True, local_theta=1e4),
    # transformers reads the cap of q · k but does not apply it, so such a model is ambiguous.
    only={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
    names=gemma2.NAMES,
)
