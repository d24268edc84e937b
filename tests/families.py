"""Tiny models of every family, with odd settings: what the tests of families run over.

`ROWS` is the list of what is covered; `docs/models.md` is made from it and from the largest
difference of logits between transformers and ReLax:

    python tests/families.py > docs/models.md
"""

import functools
import tempfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax.models import Transformer, TransformerConfig, load_pretrained
from relax.models.families import family_of
from relax.models.huggingface.tensors import leaf_shapes

V = 61  # ids of the tiny vocabularies
T = 14  # tokens in a row, more than every window and every original length below
SIZES = {
    "vocab_size": V,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
ONE_EACH = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}
THIRDS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASED = {"attention_bias": True}
FULL, SLIDING, CONV = "full_attention", "sliding_attention", "conv"
DELTA = "linear_attention"
SMALL_POSITIONS = {"max_position_embeddings": 8}


def rope(kind, theta=500.0, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


LLAMA3 = {  # of the five planes one is kept, one blended and three divided
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ORIGINAL = {"original_max_position_embeddings": 8}
LONG = {
    "short_factor": [1.0, 1.1, 1.25, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 7.0],
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
GEMMA4_ROPES = {  # 3 of 8 planes turn in full layers
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 300.0},
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
TWO_LAYERS = {"num_hidden_layers": 2}
YARN = {  # of the five planes one is kept, one blended and three divided
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 8.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    **ORIGINAL,
}
FACTORS = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.45,
}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}

# Name -> (model_type, what is special about it, fields of config.json beside SIZES).
ROWS = {
    "llama": ("llama", "tied; 3 heads, 1 for keys and values", TIED | THREE_HEADS),
    "llama-biases": ("llama", "biases; untied", UNTIED | BIASED | {"mlp_bias": True}),
    "llama-linear": (
        "llama",
        "rope linear; as many key heads as query heads",
        ONE_EACH | rope("linear", factor=2.5),
    ),
    "llama-llama3": ("llama", "rope llama3", TIED | rope("llama3", 5000.0, **LLAMA3)),
    "llama-yarn": ("llama", "rope yarn", rope("yarn", factor=4.0, **ORIGINAL)),
    "llama-yarn-smooth": (
        "llama",
        "rope yarn with other betas and scales, no truncation",
        rope(
            "yarn",
            50.0,
            factor=4.0,
            beta_fast=2.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=0.4,
            truncate=False,
            **ORIGINAL,
        ),
    ),
    "llama-dynamic": ("llama", "rope dynamic", SMALL_POSITIONS | rope("dynamic", factor=3.0)),
    "smollm3": (
        "smollm3",
        "a layer without positions, with a window",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
        }
        | TIED
        | BIASED,
    ),
    "mistral": ("mistral", "a window on every layer", {"sliding_window": 5} | THREE_HEADS),
    "mistral-full": ("mistral", "no window; tied", {"sliding_window": None} | TIED),
    "qwen2": (
        "qwen2",
        "biases of queries, keys and values; a window on the last layer",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2} | TIED,
    ),
    "qwen2-yarn": (
        "qwen2",
        "rope yarn; untied, no window",
        UNTIED | ONE_EACH | rope("yarn", factor=4.0, attention_factor=1.3, **ORIGINAL),
    ),
    "qwen3": ("qwen3", "norms of each query and key; tied", TIED | THREE_HEADS),
    "qwen3-window": (
        "qwen3",
        "windows by layer_types; biases; untied",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL, SLIDING],
        }
        | UNTIED
        | BIASED,
    ),
    "gemma2": (
        "gemma2",
        "four norms, soft caps, alternating windows; tied",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
        },
    ),
    "gemma2-exact": (
        "gemma2",
        "no caps; exact GELU; biases; untied",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu",
            "layer_types": [FULL, SLIDING, SLIDING],
        }
        | UNTIED
        | BIASED
        | THREE_HEADS,
    ),
    "gemma3_text": (
        "gemma3_text",
        "norms of queries and keys, two rope bases, windows in 2 of 3 layers; rope linear; tied",
        {
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 9,
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
    "gemma3_text-cap": (
        "gemma3_text",
        "cap of the logits; biases; untied",
        {
            "sliding_window": 3,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 2.0,
            "layer_types": [SLIDING, FULL, SLIDING],
        }
        | UNTIED
        | BIASED
        | ONE_EACH,
    ),
    "gemma4_text": (
        "gemma4_text",
        "wider heads in full layers, of which a part turns; two layers with the keys of others and "
        "twice the width; inputs of each layer; a cap of the logits; biases",
        {
            "num_hidden_layers": 5,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
            "initializer_range": 0.15,
            "sliding_window": 5,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": V + 3,
            "final_logit_softcapping": 2.5,
            "rope_parameters": GEMMA4_ROPES,
        }
        | BIASED,
    ),
    "gemma4_text-shared": (
        "gemma4_text",
        "two of three layers with the keys of the first; all full; rope with a factor; untied",
        {
            "layer_types": [FULL] * 3,
            "initializer_range": 0.15,
            "global_head_dim": 14,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": V,
            "hidden_activation": "silu",
            "rope_parameters": {FULL: GEMMA4_ROPES[FULL] | {"factor": 1.5}},
        }
        | UNTIED,
    ),
    "gemma4_text-keys": (
        "gemma4_text",
        "values from keys and more heads of them in full layers; no inputs of each layer; untied",
        {
            "layer_types": [FULL, SLIDING, FULL],
            "sliding_window": 4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 3,
            "global_head_dim": 12,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": GEMMA4_ROPES | {FULL: {"rope_type": "default", "rope_theta": 90.0}},
        }
        | UNTIED,
    ),
    "phi3": (
        "phi3",
        "fused matrices, a window, partial rotary heads",
        {"sliding_window": 5, "partial_rotary_factor": 0.5} | THIRDS | rope("default", 200.0),
    ),
    "phi3-longrope": (
        "phi3",
        "rope longrope; partial rotary heads; tied",
        {"original_max_position_embeddings": 8}
        | rope("longrope", 200.0, partial_rotary_factor=0.7, **LONG)
        | THIRDS
        | TIED,
    ),
    "olmo2": (
        "olmo2",
        "norms after the blocks, one norm for all queries; biases",
        BIASED | UNTIED,
    ),
    "olmo3": (
        "olmo3",
        "OLMo 2 with windows; rope yarn in full layers alone; biases",
        {
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL],
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 50.0}},
        }
        | BIASED
        | TWO_LAYERS,
    ),
    "olmo3-unscaled": (
        "olmo3",
        "unscaled rope; tied",
        {"sliding_window": 6, "layer_types": [FULL, SLIDING]} | TIED | ONE_EACH | TWO_LAYERS,
    ),
    "ministral3": (
        "ministral3",
        "queries that grow with positions; rope yarn; a window",
        {
            "sliding_window": 8,
            "rope_parameters": {"llama_4_scaling_beta": 0.7, "mscale": 0.6, "mscale_all_dim": 0.9}
            | YARN
            | {"original_max_position_embeddings": 4},
        }
        | TWO_LAYERS,
    ),
    "ministral3-unscaled": (
        "ministral3",
        "rope default; no window; tied",
        {"sliding_window": None}
        | rope("default", llama_4_scaling_beta=0.3, original_max_position_embeddings=3)
        | TIED
        | THREE_HEADS
        | TWO_LAYERS,
    ),
    "exaone4": (
        "exaone4",
        "norms after the blocks, a window, no positions in full layers; rope llama3",
        {"sliding_window": 5, "layer_types": [SLIDING, FULL]}
        | rope("llama3", 5000.0, **LLAMA3)
        | TWO_LAYERS,
    ),
    "exaone4-full": (
        "exaone4",
        "no window, positions in every layer; tied",
        {"sliding_window": None, "layer_types": [FULL, FULL]} | TIED | THREE_HEADS | TWO_LAYERS,
    ),
    "granite": (
        "granite",
        "factors of embeddings, attention, residual branches and logits; biases",
        FACTORS | BIASED | {"mlp_bias": True} | TWO_LAYERS,
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        "Granite 4 dense: Granite with fused matrices; biases",
        FACTORS
        | {
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "shared_intermediate_size": 20,
            "mamba_n_heads": 8,
            "position_embedding_type": "rope",
        }
        | BIASED
        | TWO_LAYERS,
    ),
    "granitemoehybrid-nope": (
        "granitemoehybrid",
        "no positions; tied",
        {
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "shared_intermediate_size": 20,
            "mamba_n_heads": 8,
            "position_embedding_type": None,
        }
        | TIED
        | THIRDS
        | TWO_LAYERS,
    ),
    "glm4": (
        "glm4",
        "four norms, fused matrices, half of a head turns, neighbours as planes; biases",
        rope("default", 200.0) | THIRDS | TWO_LAYERS,
    ),
    "glm4-linear": (
        "glm4",
        "another part of a head turns; rope linear; no biases; tied",
        rope("linear", 200.0, factor=2.5, partial_rotary_factor=0.8)
        | {"attention_bias": False}
        | TIED
        | TWO_LAYERS,
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        "norms of queries and keys after rotation; rope with alpha; biases",
        rope("dynamic", factor=1.0, alpha=7.0) | BIASED | TWO_LAYERS,
    ),
    "hunyuan_v1_dense-unscaled": (
        "hunyuan_v1_dense",
        "unscaled rope; tied",
        rope("default", 200.0) | TIED | THREE_HEADS | TWO_LAYERS,
    ),
    "seed_oss": (
        "seed_oss",
        "biases of queries, keys and values; untied",
        NO_DROPOUT | rope("default", 200.0) | TWO_LAYERS,
    ),
    "seed_oss-outputs": (
        "seed_oss",
        "biases of outputs and feed-forward blocks; tied",
        NO_DROPOUT
        | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}
        | TIED
        | THREE_HEADS
        | TWO_LAYERS,
    ),
    "ernie4_5": (
        "ernie4_5",
        "neighbours as planes; biases; untied",
        {"use_bias": True} | rope("linear", 200.0, factor=2.5) | UNTIED | TWO_LAYERS,
    ),
    "arcee": (
        "arcee",
        "squared rectifiers without a gate; biases; rope yarn",
        BIASED | {"mlp_bias": True, "rope_parameters": YARN} | TWO_LAYERS,
    ),
    "nanochat": (
        "nanochat",
        "norms without scales, one on the embeddings; no gate; a cap of the logits; biases",
        {"final_logit_softcapping": 2.5} | rope("linear", 200.0, factor=2.5) | BIASED | TWO_LAYERS,
    ),
    "apertus": (
        "apertus",
        "an activation with parameters, no gate; norms of queries and keys; rope llama3; biases",
        rope("llama3", 5000.0, **LLAMA3) | BIASED | TWO_LAYERS,
    ),
    "apertus-relu2": (
        "apertus",
        "squared rectifiers; rope linear; tied",
        {"hidden_act": "relu2"} | rope("linear", 200.0, factor=2.5) | TIED | ONE_EACH | TWO_LAYERS,
    ),
    "lfm2": (
        "lfm2",
        "convolutions with biases, a layer of attention; adjusted width; untied",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, CONV, FULL, CONV],
            "conv_L_cache": 4,
            "conv_bias": True,
            "block_multiple_of": 6,
            "block_ffn_dim_multiplier": 1.3,
            "norm_eps": 1e-4,
        }
        | rope("linear", 200.0, factor=2.5)
        | UNTIED,
    ),
    "lfm2-indices": (
        "lfm2",
        "layers with attention by their indices; wide kernels; no adjustment; tied",
        {
            "full_attn_idxs": [0],
            "conv_L_cache": 7,
            "block_auto_adjust_ff_dim": False,
            "norm_eps": 1e-4,
        }
        | TIED
        | TWO_LAYERS,
    ),
    "lfm3": (
        "lfm3",
        "LFM2 with windows, four norms, a gate for each head; half of the planes turn; biases",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, SLIDING, FULL, CONV],
            "conv_L_cache": 4,
            "conv_bias": True,
            "sliding_window": 5,
            "norm_eps": 1e-4,
            "rope_parameters": {
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 200.0,
                    "partial_rotary_factor": 0.5,
                },
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        }
        | BIASED
        | UNTIED,
    ),
    "lfm3-yarn": (
        "lfm3",
        "two norms, no gates; rope yarn in full layers; wide kernels; tied",
        {
            "layer_types": [FULL, CONV, SLIDING],
            "conv_L_cache": 7,
            "sliding_window": 6,
            "use_sandwich_norm": False,
            "use_attention_gate": False,
            "norm_eps": 1e-4,
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 70.0}},
        }
        | TIED
        | THREE_HEADS,
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        "delta rules with grouped heads, gated attention; another part of a head turns; biases",
        {
            "layer_types": [DELTA, FULL, DELTA],
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 5,
        }
        | rope("default", 200.0, partial_rotary_factor=0.6, mrope_section=[1, 1, 1])
        | BIASED,
    ),
    "qwen3_5_text-interval": (
        "qwen3_5_text",
        "every second layer is full; as many heads of keys as of values; rope linear; tied",
        {
            "full_attention_interval": 2,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 8,
        }
        | rope("linear", 200.0, factor=2.5)
        | TIED
        | TWO_LAYERS,
    ),
    "mixtral": (
        "mixtral",
        "5 experts, 2 per token; a window",
        EXPERTS | {"num_local_experts": 5, "sliding_window": 5},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "7 experts, weights not normalised, a dense layer; tied",
        EXPERTS
        | {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        }
        | TIED
        | BIASED,
    ),
    "qwen3_moe-steps": (
        "qwen3_moe",
        "experts in every other layer, weights normalised, a window",
        EXPERTS
        | {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
        }
        | THREE_HEADS,
    ),
    "gpt_oss": (
        "gpt_oss",
        "sinks, a window in every other layer; 5 experts with biases and clamped gates; rope yarn",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.6,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gpt_oss-linear": (
        "gpt_oss",
        "a window in the last layer, no biases of attention; 4 experts; rope linear; tied",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 6,
            "layer_types": [FULL, SLIDING],
            "attention_bias": False,
        }
        | rope("linear", 200.0, factor=2.5)
        | TIED
        | THREE_HEADS
        | TWO_LAYERS,
    ),
}
# Families whose generated text is compared with that of transformers.
NEWER = (
    "gemma4_text",
    "gemma4_text-shared",
    "gemma4_text-keys",
    "olmo3",
    "ministral3",
    "exaone4",
    "granite",
    "granitemoehybrid",
    "glm4",
    "hunyuan_v1_dense",
    "seed_oss",
    "ernie4_5",
    "arcee",
    "nanochat",
    "apertus",
    "lfm2",
    "lfm3",
    "qwen3_5_text",
    "gpt_oss",
)
RECURRENT = ("lfm2", "lfm3", "qwen3_5_text")  # whose states are not keys and values alone
FAMILY_NAMES = tuple(name for name, (model_type, *_) in ROWS.items() if name == model_type)


def fields_of(name: str) -> dict:
    """config.json of a row."""
    model_type, _, fields = ROWS[name]
    sizes = {n: v for n, v in SIZES.items() if n != "rms_norm_eps" or "norm_eps" not in fields}
    return {"model_type": model_type, **sizes, **fields}


def config_of(name: str) -> TransformerConfig:
    fields = fields_of(name)
    return family_of(fields["model_type"]).from_hugging_face(fields)


@functools.cache
def tiny_family(name: str) -> tuple[Transformer, dict]:
    """A small float32 model and parameters of which none is what initialisation leaves at 0 or 1.

    `name`: of `ROWS`, or a model_type. Made without torch; treat the parameters as constants.
    """
    config = config_of(name)
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        noisy = path[-1].endswith(("bias", "scale"))
        spread = 0.3 if noisy else config.initializer_range
        near_one = {"layer_scalar"} | (set() if config.norm_plus_one else {"scale"})
        middle = 1.0 if path[-1] in near_one else 0.0
        return jnp.asarray(middle + spread * rng.normal(size=shape), jnp.float32)

    flat = {path: leaf(path, shape) for path, shape in leaf_shapes(config).items()}
    return Transformer(config), flax.traverse_util.unflatten_dict(flat)


# Four rows: one document; one after padding; one before padding; two documents and padding.
SEGMENTS = np.array(
    [[1] * 14, [0] * 5 + [1] * 9, [1] * 9 + [0] * 5, [1] * 6 + [2] * 5 + [0] * 3], np.int32
)
POSITIONS = np.array(
    [
        [*range(14)],
        [0] * 5 + [*range(9)],
        [*range(9)] + [0] * 5,
        [*range(6)] + [*range(5)] + [0] * 3,
    ],
    np.int32,
)
IDS = np.random.default_rng(0).integers(0, V, (4, T)).astype(np.int32)


def made_by_transformers(name: str):
    """A random model of transformers, norms and biases included; needs torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields_of(name))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():  # fresh biases are 0, norms are 1
            if path.endswith(
                ("bias", "norm.weight", "layernorm.weight", "sinks", "alpha_p", "alpha_n")
            ):
                parameter.add_(0.3 * torch.randn_like(parameter))
        for path, buffer in theirs.named_buffers():
            if path.endswith("layer_scalar"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    return theirs


def logits_of(theirs, ids, **inputs) -> np.ndarray:
    """Of transformers; arrays in and out."""
    import torch

    tensors = {key: torch.tensor(np.array(value)) for key, value in inputs.items()}
    with torch.no_grad():
        return theirs(torch.tensor(np.array(ids)), use_cache=False, **tensors).logits.numpy()


def reference_logits(theirs) -> np.ndarray:
    """`[4, T, V]`: the three padded rows as one batch, and the two documents each alone.

    Where the rotation depends on the length, transformers takes the longest of a batch, and we
    each document's own: there all documents go alone, in the order of their lengths and each after
    one of a single token, since it also keeps what it has computed for a longer one. Of LFM2 with
    biases too, since there transformers lets padding into the convolutions.
    """
    logits = np.zeros((4, T, V), np.float32)
    documents = [(3, slice(0, 6)), (3, slice(6, 11))]
    by_length = (theirs.config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope")
    if by_length or getattr(theirs.config, "conv_bias", False):
        documents += [(0, slice(0, 14)), (1, slice(5, 14)), (2, slice(0, 9))]
    else:
        mask = SEGMENTS[:3]
        logits[:3] = logits_of(theirs, IDS[:3], attention_mask=mask, position_ids=POSITIONS[:3])
    for row, place in documents:
        logits_of(theirs, IDS[:1, :1])
        logits[row, place] = logits_of(theirs, IDS[row : row + 1, place])[0]
    return logits


def our_logits(model, params) -> np.ndarray:
    """`[4, T, V]` of all rows in one batch."""
    return np.asarray(jax.jit(model.apply)({"params": params}, IDS, POSITIONS, SEGMENTS))


def difference(ours: np.ndarray, theirs: np.ndarray, rows=slice(None)) -> float:
    """The largest one, over what is no padding."""
    return float(np.abs(ours - theirs)[rows][SEGMENTS[rows] > 0].max())


HEAD = """\
# Models

`load_pretrained` reads a Hugging Face directory of these families, and `save_pretrained` writes one
that transformers and vLLM load. The table comes from the tests: tiny random models of
transformers with unusual settings, and the largest difference of its logits and ours, both in
float32, for a single row, left padding, right padding and two documents in a row. It is written by

    python tests/families.py > docs/models.md

| model_type | model | settings | largest difference |
|---|---|---|---|
"""
TAIL = """
Most have grouped heads and a `head_dim` other than `hidden_size` divided by the number of heads.
Models with experts have the load-balancing loss of transformers.

## What is read

- `config.json` of transformers 4 and 5. An unsupported or unknown field that may affect the
  computation is an error that names it. Rope settings
  are written in both forms, so that transformers 4.57 and 5.24 read the same model.
- `model.safetensors`, or its shards and their index; nothing is unpickled. Missing, extra and
  misshapen tensors are errors that list them, as is a weight that
  is NaN or infinite. One extra tensor is allowed: an output matrix
  identical to tied embeddings, as in the files of Qwen 3.
- Keys and values of Gemma 4's last layers, which use those of another layer and none of their own,
  stand in real files all the same. They are not read, and not written, except beside a text part.
- Experts as one tensor each, which is also how they are written, or stacked, as in transformers 5.
- Experts of gpt-oss as they are, or in MXFP4 (`_blocks` and `_scales`): as bfloat16, which holds
  those numbers exactly. They are written as they are, and `config.json` without
  `quantization_config`: in bfloat16 where all weights were read so (`--param_dtype bfloat16`, or
  `dtype` of `save_pretrained`). No other quantised files are read.
- Rope settings `default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope`, Hunyuan's `alpha`,
  and `proportional` of Gemma 4 and LFM3. If the rotation
  depends on the length, as with `dynamic` and `longrope`, the length is that of each document, not
  the longest of the batch as in transformers, so the output for a text depends on nothing else.

- End tokens: `eos_token_id` of `generation_config.json`, an id or a list; without
  that file, of `config.json`; and the tokenizer's. All are kept on export.

- Dropout that config.json asks for, as those of Hunyuan, Granite 3.1 and Seed-OSS do, is not
  applied; a warning says so.

## Layers without attention

Convolutions (LFM2) and gated delta rules (Qwen 3.5 to 3.8) carry a state from token to token. A
document in a row begins with an empty one, whatever stands before it. A completion behind a shared
prompt begins with the state behind the prompt, which is computed once, as for attention. So the
tokens of a document must be contiguous, and its parent must be the nearest document before it that
has no parent itself, as `relax.data.forest` lays them out. In generation each slot begins with the
state of its prompt.

Whole rows are computed in chunks of 64 tokens, with `jax.lax` alone and in float32; decoding takes
one token after the other. The state of a delta rule is float32 in the cache, whatever the dtype of
the model.

## Gemma 4

E2B, E4B and 31B are supported, not those with experts (26B). Full layers may have wider heads than
those with windows, and fewer heads of keys and values (`per_layer_config` of transformers 5, or
`global_head_dim` and `num_global_key_value_heads` as in the models' own files, which is how they
are written). The last layers of E2B and E4B attend to the keys and values of an earlier layer of
their type, and have none of their own, in training and in the cache. Each token has an input of its
own for each layer: a second table of embeddings, which is trained like the first, and left alone
with adapters. The factor of each layer (`layer_scalar`) is not trained, as in transformers.

Heads of 512 are beyond cuDNN's attention: on a GPU those layers, one in five or six, run XLA's.

## Text parts

Of a directory of Qwen 3.5, Gemma 3 or Gemma 4 for images and text (`qwen3_5`, `gemma3`, `gemma4`),
the text model is read, as a `qwen3_5_text`, `gemma3_text` or `gemma4_text`; of one of Ministral 3
or Mistral Small (`mistral3`), as a `ministral3` or `mistral`. A run writes it back among all that
surrounds it: towers of images and sound, projectors, layers under `mtp.` and every other tensor
stay byte for byte as they were, untrained, and `config.json` changes in its dtype alone. In Python,
that is `save_pretrained(path, model, params, beside=DIRECTORY)`; without `beside` the text model is
saved alone. An adapter belongs to the text model.

Embeddings of a text part are tied where transformers 5 ties them: not if its files hold an output
matrix of other numbers. Of `mistral3` the field outside of `text_config` counts alone, and is true
where it is absent.

Of Granite 4 (`granitemoehybrid`), the dense ones without Mamba layers are supported.

## gpt-oss

Each head of attention has a sink, one more score in its softmax (`sinks`), in training and in the
cache. No kernel has them, so that all layers run XLA's attention on every device. Experts have
biases, and gates that are cut off at `swiglu_limit`. MXFP4 is read, and never written.

Their adapters are one for both projections of an expert, `gate_up_proj`, whose outputs alternate in
the files, and one for `down_proj`, as PEFT has them.

## Limits

A downloaded directory may contain anything. No code in it is run, links out of it are refused for
every file that is read, here or by the tokenizer's library, and sizes are limited. The limits are
in `relax/files.py`.

| what | limit | why |
|---|---|---|
| a configuration or an index (`JSON_BYTES`) | 50 MB | real indices have up to 10 MB |
| its nesting of objects and lists (`JSON_DEPTH`) | 64 | real ones have up to 5 |
| each file of a tokenizer (`TOKENIZER_BYTES`) | 200 MB | real ones have up to 35 MB |
| a chat template (`TEMPLATE_BYTES`) | 1 MB | real ones have up to 20 kB |
| a tensor | its shape by `config.json` | checked before it is read |

## Adapters

A directory with `adapter_config.json` and `adapter_model.safetensors` is an adapter of PEFT, and is
merged into its model when loaded; `--use_peft` saves one. Its fields have the meaning of
PEFT 0.21, whose logits are the reference in the tests:

- Keys of `rank_pattern` and `alpha_pattern` are regular expressions for ends of names, in which a
  dot is any character, and the first matching key counts. Letters, wildcards, classes and groups
  are read, with at most three repeats (`*`, `+`, `?`); others are refused, since matching might
  never end.
- `layers_to_transform` is an index or a list. As in PEFT, it does not apply to modules that
  `target_modules` names in full or by `all-linear`.
- Adapters in the file that the fields do not target are refused; PEFT ignores them.
- In models with experts, PEFT 0.21 takes every target that ends in `gate_proj`, `up_proj` or
  `down_proj` for the experts. Adapters of dense layers beside experts are therefore saved as
  `target_parameters`, which PEFT adapts to the same logits, without dropout in further training.
- `all-linear` adapts experts too, and not the router, which PEFT's own `all-linear` includes; name
  `router` for it. The experts of a layer are one parameter there, `gate_up_proj` or `down_proj`,
  and ours are read and written so. `gate_proj` and `up_proj` then share one adapter of twice the
  rank, of which PEFT 0.21 warns that its `rank_pattern` is ignored, and applies it.
- `modules_to_save` are ends of names: embeddings, the output matrix, norms, linear layers with
  their biases. Where the embeddings are the output matrix too, they are read with
  `ensure_weight_tying`, and written so; without it PEFT would train them apart. Experts and
  quantised weights are not trained in full.
- Adapters of `embed_tokens` are read and written (`lora_embedding_A` and `_B`). They are not merged
  where the embeddings are the output matrix too, which the adapter leaves as it is; `lm_head` and
  DoRA on embeddings are refused.

## The end of a completion

A completion ends at the first of an end token, a stop string, and its limit of tokens; neither of
the first two counts before `min_new_tokens`. Stop strings are searched for in the text of all
tokens, including special ones: a stop string that is or contains a special token ends the
completion at that token. The token that ends a completion is its last one.

## A new family

One file in `relax/models/families/` with a `FAMILY`, its name in the list of
`relax/models/families/__init__.py`, and a row in `ROWS` of `tests/families.py`.
"""


def main():
    """Prints docs/models.md."""
    print(HEAD, end="")
    for name, (model_type, what, _) in ROWS.items():
        theirs = made_by_transformers(name)
        with tempfile.TemporaryDirectory() as path:
            theirs.save_pretrained(path)
            ours = our_logits(*load_pretrained(path))
        largest = difference(ours, reference_logits(theirs))
        title = name.removeprefix(model_type).removeprefix("-") or "plain"
        print(f"| {model_type} | {title} | {what} | {largest:.0e} |", flush=True)
    print(TAIL, end="")


if __name__ == "__main__":
    main()
