"""The arithmetic and the parameters of a model, counted from its shapes."""

import jax
import jax.numpy as jnp

from relax.models import Transformer, TransformerConfig
from relax.models.config import LayerSpec


def parameter_count(shape: TransformerConfig) -> int:
    """The number of parameters of the whole model."""
    return sum(leaf.size for leaf in jax.tree.leaves(_shapes(shape)))


def _shapes(shape: TransformerConfig):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Transformer(shape).init, jax.eval_shape(lambda: jax.random.key(0)), ids)[
        "params"
    ]


def forward_flops(shape: TransformerConfig, tokens: int, length: int) -> float:
    """FLOPs of a forward pass over `tokens`, on average behind half of `length` others.

    2 per weight and token, counting only the experts of a token and no table of embeddings; 4 per
    entry of a query and key that it attends to; 7 per entry of the states of a delta rule, which
    decay, are multiplied by the key and the query, and get the product of the key and a correction.
    """
    looked_up = {"embed_tokens_per_layer"}
    looked_up |= set() if shape.tie_word_embeddings else {"embed_tokens"}
    weights = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(_shapes(shape))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "experts/" in name and leaf.ndim == 3:
            weights += leaf.size * shape.num_experts_per_tok / shape.num_experts
        elif leaf.ndim >= 2 and name not in looked_up:
            weights += leaf.size
    return tokens * (
        2 * weights + sum(_mixing_flops(shape, layer, length) for layer in shape.layers)
    )


def _mixing_flops(shape: TransformerConfig, layer: LayerSpec, length: int) -> float:
    """FLOPs per token of a layer's mixer besides those of its weights."""
    if layer.mixer == "attention":
        window = min(layer.window or length, length)
        seen = window - window**2 / (2 * length)  # the mean of min(window, tokens so far)
        return 4 * shape.num_attention_heads * layer.head_dim * seen
    if layer.mixer == "delta":
        state = shape.linear_key_head_dim * shape.linear_value_head_dim
        return 7 * shape.linear_num_value_heads * state
    return 0.0
