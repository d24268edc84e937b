"""ERNIE 4.5 dense models: Llama whose rotated planes are neighbours."""

from relax.models.families.family import Family
from relax.models.families.fields import FLAG, HIDDEN_ACT, Field, common
from relax.models.families.rope import RopeFields

FAMILY = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    fields={
        **common(
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            num_key_value_heads=2,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        "hidden_act": HIDDEN_ACT,
        "use_bias": Field(FLAG, False, ("attention_bias", "output_bias", "mlp_bias")),
    },
    fixed={"rope_interleaved": True},
    rope=RopeFields(theta=5e5),
)
