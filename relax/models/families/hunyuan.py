"""Hunyuan dense models: Llama with norms of queries and keys after their rotation."""

from relax.models.families.family import Family
from relax.models.families.fields import ATTENTION_BIAS, HIDDEN_ACT, common
from relax.models.families.rope import SETTINGS, RopeFields

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    fields={
        **common(max_position_embeddings=2048, rms_norm_eps=1e-5),
        "hidden_act": HIDDEN_ACT,
        "attention_bias": ATTENTION_BIAS,
    },
    fixed={"qk_norm": "rotated"},
    rope=RopeFields(kinds=tuple(SETTINGS)),
    # Fields of files that transformers does not read; vLLM reads the first two.
    only={
        "use_qk_norm": (True,),
        "use_cla": (False,),
        "use_rotary_pos_emb": (True,),
        "mlp_bias": (False,),
        "norm_type": ("rms",),
        "add_classification_head": (False,),
    },
    harmless=frozenset(
        """
        eod_token_id pad_id im_start_id im_end_id im_newline_id image_token_id text_start_id
        text_end_id mask_init_id org_vocab_size cla_share_factor class_num pool_type dense_list
        """.split()
    ),
    repeats={"attention_head_dim": "head_dim"},
    names={"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
)
