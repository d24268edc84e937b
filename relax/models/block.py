"""One layer of the transformer: norms, projections and the feed-forward block around attention.

Axes: B batch, T token of a row, D model, F feed-forward, N query heads, K key-value heads,
G = N / K query heads per key-value head, H head; M tokens of all rows, flattened.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import LayerSpec, LoRA, TransformerConfig
from relax.models.layers import Linear, RMSNorm
from relax.models.moe import Experts, activation
from relax.models.rotary import Angles, rotate, scale_queries


class Context(NamedTuple):
    """Properties of the tokens that a layer needs besides their states; no gradients.

    Attributes:
      angles: of the rotary positions; None: no positions.
      real: `[M]` bool, false for padding.
      mask: which keys each query sees, in the form that the layer's `Attend` takes.
      segment_ids: `[B, T]` int, the document of each token of a row; None: one per row.
    """

    angles: Angles | None
    real: jax.Array
    mask: Any = None
    segment_ids: jax.Array | None = None


# Attention over the keys of whole rows, of groups of completions, or of a cache.
#     attend(q [M, K, G, H], k [M, K, H], v [M, K, H], context) -> (out [M, N * H], kept)
# q and k are rotated to their positions. `kept` is the keys and values for a cache, or None.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Context], tuple[jax.Array, Any]]


class Block(nn.Module):
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x)).

    Norms are before the two blocks, after them, or both (`pre_norm`, `post_norm`).
    """

    config: TransformerConfig
    layer: LayerSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoRA | None = None

    def setup(self):
        c = self.config
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = self._linear(heads, c.attention_bias)
        self.k_proj = self._linear(kv_heads, c.attention_bias)
        self.v_proj = self._linear(kv_heads, c.attention_bias)
        self.o_proj = self._linear(c.hidden_size, c.output_bias)
        if c.qk_norm is not None:
            self.q_norm, self.k_norm = self._norm(), self._norm()
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = self._norm(), self._norm()
        if c.post_norm:
            self.post_attention_norm, self.post_mlp_norm = self._norm(), self._norm()
        if self.layer.experts:
            self.experts = Experts(c, self.dtype, self.param_dtype)
        else:
            if c.gated_mlp:
                self.gate_proj = self._linear(c.intermediate_size, c.mlp_bias)
            self.up_proj = self._linear(c.intermediate_size, c.mlp_bias)
            self.down_proj = self._linear(c.hidden_size, c.mlp_bias)

    def _norm(self):
        c = self.config
        return RMSNorm(
            c.rms_norm_eps,
            c.norm_plus_one,
            self.dtype,
            self.param_dtype,
            has_scale=c.norm_scale,
        )

    def _linear(self, features, use_bias):
        return Linear(
            features,
            use_bias,
            self.config.initializer_range,
            self.dtype,
            self.param_dtype,
            self.lora,
        )

    def __call__(self, x: jax.Array, context: Context, attend: Attend):
        """Applies the layer to all tokens at once.

        Args:
          x: `[M, D]`.
          context: see `Context`.
          attend: see `Attend`.

        Returns:
          `[M, D]`, the values that `attend` keeps, and the router's sums (None without experts).
        """
        c = self.config
        h = self.attention_norm(x) if c.pre_norm else x
        q, k, v = self.queries_keys_values(h, context.angles)
        h, kept = attend(q, k, v, context)
        h = self.o_proj(h)
        x = x + c.residual_multiplier * (self.post_attention_norm(h) if c.post_norm else h)
        h = self.mlp_norm(x) if c.pre_norm else x
        h, router = self.feed_forward(h, context.real)
        x = x + c.residual_multiplier * (self.post_mlp_norm(h) if c.post_norm else h)
        return parallel.constrain(x, "batch", None), kept, router

    def queries_keys_values(self, x, angles):
        """`[M, D]` -> rotated q `[M, K, G, H]`, rotated k and v `[M, K, H]`."""
        c = self.config
        M, K, H = x.shape[0], c.num_key_value_heads, c.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(M, K, -1, H), k.reshape(M, K, 1, H), v.reshape(M, K, H)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, angles, c.rope_interleaved) for x in (q, k))
        if c.qk_norm == "rotated":
            q, k = self.q_norm(q), self.k_norm(k)
        return scale_queries(q, angles), k[:, :, 0], v

    def feed_forward(self, x, real):
        """`[M, D]` -> `[M, D]`, and the router's sums.

        (act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down without a gate.
        """
        if self.layer.experts:
            return self.experts(x, real)
        act, up = activation(self.config.hidden_act), self.up_proj(x)
        return self.down_proj(
            act(self.gate_proj(x)) * up if self.config.gated_mlp else act(up)
        ), None
