"""Inputs that tokens have for each layer, besides the embeddings that go through all of them.

Axes: M tokens of all rows, D model, L layers, P width of an input.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import LoRA, TransformerConfig
from relax.models.layers import Linear, RMSNorm


class PerLayerInputs(nn.Module):
    """e = (norm(x W / sqrt(D)) + sqrt(P) E[id]) / sqrt(2), a part of it for each layer.

    x are the embeddings of the tokens and E is a second table of embeddings. The norm is over P.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoRA | None = None

    def setup(self):
        c = self.config
        width = c.num_hidden_layers * c.hidden_size_per_layer_input
        init, shape = nn.initializers.normal(c.initializer_range), c.vocab_size_per_layer_input
        self.embed_tokens_per_layer = self.param(
            "embed_tokens_per_layer", init, (shape, width), self.param_dtype
        )
        self.per_layer_model_projection = Linear(
            width, False, c.initializer_range, self.dtype, self.param_dtype, self.lora
        )
        self.per_layer_projection_norm = RMSNorm(
            c.rms_norm_eps, c.norm_plus_one, self.dtype, self.param_dtype
        )

    def __call__(self, input_ids: jax.Array, x: jax.Array) -> jax.Array:
        """M ids in any shape, and embeddings `[M, D]` -> `[M, L, P]`."""
        c, P = self.config, self.config.hidden_size_per_layer_input
        table = parallel.gather_for_use(
            self.embed_tokens_per_layer, "embed_tokens_per_layer", dtype=self.dtype
        )
        of_ids = table[input_ids.reshape(-1)].astype(self.dtype) * jnp.asarray(P**0.5, self.dtype)
        of_states = self.per_layer_model_projection(x) * jnp.asarray(c.hidden_size**-0.5, x.dtype)
        of_ids, of_states = (y.reshape(x.shape[0], -1, P) for y in (of_ids, of_states))
        both = self.per_layer_projection_norm(of_states) + of_ids
        return parallel.constrain(both * jnp.asarray(2**-0.5, x.dtype), "batch", None, None)
