"""Score heads of critics and reward models: one number per token instead of logits.

    v_t = h_t w,   h_t the trunk's last normalised hidden state, w [D, 1] the leaf `score/kernel`

Parameters of a scoring model are those of its trunk, a `Transformer` without an output matrix of
its own, and `score` beside them: `{"embed_tokens": ..., "layers_0": ..., "norm": ..., "score":
{"kernel": [D, 1]}}`. The head has no bias, and its name is Hugging Face's of sequence classifiers.

Axes: B batch, T tokens, D model.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from relax.models.config import TransformerConfig
from relax.models.transformer import Transformer

HEAD = "score"


def trunk(model: Transformer) -> Transformer:
    """The model without a separate output matrix, as the trunk of a head."""
    return model.clone(config=trunk_config(model.config))


def trunk_config(config: TransformerConfig) -> TransformerConfig:
    """The configuration of a trunk, whose states are not divided by `logits_scaling`."""
    return dataclasses.replace(config, tie_word_embeddings=True, logits_scaling=1.0)


def init_head(
    key: jax.Array, config: TransformerConfig, std: float | None = None, dtype=jnp.float32
) -> dict:
    """Initialises a head from N(0, std²).

    Args:
      key: the head's own key follows from this one.
      std: None: the config's `initializer_range`; 0: all scores are 0 at first.

    Returns:
      `{"kernel": [D, 1]}`.
    """
    std = config.initializer_range if std is None else std
    key = jax.random.fold_in(key, zlib.crc32(HEAD.encode()))
    return {"kernel": std * jax.random.normal(key, (config.hidden_size, 1), dtype)}


def with_head(params, head: dict) -> dict:
    """Replaces the output matrix in a language model's parameters by a head.

    >>> with_head({"embed_tokens": 1, "lm_head": 2}, {"kernel": 3})
    {'embed_tokens': 1, 'score': {'kernel': 3}}
    """
    return {name: value for name, value in params.items() if name != "lm_head"} | {HEAD: head}


def scores(params, hidden: jax.Array) -> jax.Array:
    """Scores `[..., T]`, float32, of hidden states `[..., T, D]` of any dtype.

    Args:
      params: with the head among them, under `score`.
      hidden: states as `relax.models.forward` gives them.
    """
    kernel = params[HEAD]["kernel"].astype(jnp.float32)
    return jnp.matmul(hidden.astype(jnp.float32), kernel)[..., 0]
