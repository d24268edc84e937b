"""Llama 2/3, SmolLM2 and kin: Hugging Face configuration and tensor names, as data."""

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"

# A field of config.json that must have one of these values, since another one would change the
# computation in a way that the transformer does not have.
REQUIRED = {"hidden_act": ("silu", "swish"), "rope_type": ("default", "linear", "llama3")}

# Path in our parameters -> name in the file; {i} is the layer. Kernels are [in, out] here and
# [out, in] there.
TENSORS = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_TENSORS = {
    "input_layernorm/scale": "model.layers.{i}.input_layernorm.weight",
    "post_attention_layernorm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    **{
        f"{p}_proj/{ours}": f"model.layers.{{i}}.self_attn.{p}_proj.{theirs}"
        for p in "qkvo"
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"{p}_proj/{ours}": f"model.layers.{{i}}.mlp.{p}_proj.{theirs}"
        for p in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
