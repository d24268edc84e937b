"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Axes: B batch, T query, S key, D model, F feed-forward, N query heads, K key-value heads,
G = N / K heads per key-value head, H head, L layer, V vocabulary; M = B * T tokens.

Every matrix product sees its tokens flattened to [M, D]. XLA's backward pass for CPUs is about
twice as fast on them as on [B, T, D], and accelerators do not tell the two apart.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax.models.attention import SAVED, attend, attention_mask, rotary_angles, rotate
from relax.models.config import TransformerConfig
from relax.models.remat import checkpointed

# Under gradient checkpointing a layer keeps what its matrix products and its attention gave, and
# computes norms, rotations and products of gates again: no matrix product is done twice.
SAVED_OUTPUTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED),
)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * scale, computed in float32."""

    eps: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale[None, :].astype(jnp.float32)).astype(self.dtype)


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += swiglu(norm(x))."""

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        c = self.config
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.input_layernorm = self._norm()
        self.q_proj = self._dense(heads, c.attention_bias)
        self.k_proj = self._dense(kv_heads, c.attention_bias)
        self.v_proj = self._dense(kv_heads, c.attention_bias)
        self.o_proj = self._dense(c.hidden_size, c.attention_bias)
        self.post_attention_layernorm = self._norm()
        self.gate_proj = self._dense(c.intermediate_size, c.mlp_bias)
        self.up_proj = self._dense(c.intermediate_size, c.mlp_bias)
        self.down_proj = self._dense(c.hidden_size, c.mlp_bias)

    def _norm(self):
        return RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype)

    def _dense(self, features, use_bias):
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
        )

    def attention(self, x, angles, mask):  # x: [M, D]
        c, (B, T) = self.config, mask.shape[:2]
        K, H = c.num_key_value_heads, c.head_dim
        q = rotate(self.q_proj(x).reshape(B, T, K, -1, H), angles)  # [B, T, K, G, H]
        k = rotate(self.k_proj(x).reshape(B, T, K, 1, H), angles)[:, :, :, 0]  # [B, S, K, H]
        v = self.v_proj(x).reshape(B, T, K, H)
        return self.o_proj(attend(q, k, v, mask).reshape(B * T, -1))

    def swiglu(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))

    def __call__(self, x, angles, mask):
        x = x + self.attention(self.input_layernorm(x), angles, mask)
        return x + self.swiglu(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Token ids to next-token logits.

    `model.apply({"params": params}, input_ids, positions=None, segment_ids=None)` gives the
    logits; `method="hidden_states"` stops before the vocabulary, for losses that work on chunks of
    tokens with `output_matrix(params)`.

    Attributes:
      config: sizes and switches.
      dtype: of the computation; norms, softmax, rotary positions and logits stay in float32.
      param_dtype: of the parameters.
      gradient_checkpointing: keep less of each layer for the backward pass (`SAVED_OUTPUTS`).
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = self.param(
            "embed_tokens", init, (c.vocab_size, c.hidden_size), self.param_dtype
        )
        if not c.tie_word_embeddings:
            self.lm_head = self.param(
                "lm_head", init, (c.vocab_size, c.hidden_size), self.param_dtype
            )
        self.layers = [Block(c, self.dtype, self.param_dtype) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)

    def hidden_states(self, input_ids, positions=None, segment_ids=None):
        """The last layer's normalised outputs.

        Args:
          input_ids: `[B, T]` int, each in [0, vocab_size).
          positions: `[B, T]` int, the rotary position of each token; None counts from 0.
          segment_ids: `[B, T]` int; a token attends to earlier tokens of its own segment only, so
            that several documents, or padding (its own segment), share a row. None: one segment.

        Returns:
          `[B, T, D]` in `dtype`.
        """
        B, T = input_ids.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        angles = rotary_angles(positions, self.config)
        mask = attention_mask(segment_ids, B, T)
        x = self.embed_tokens[input_ids.reshape(-1)].astype(self.dtype)  # [M, D]
        for layer in self.layers:
            x = self._run(layer, x, (angles, mask))
        return self.norm(x).reshape(B, T, -1)

    def _run(self, layer, x, constants):
        if not self.gradient_checkpointing or self.is_initializing():
            return layer(x, *constants)
        block = Block(self.config, self.dtype, self.param_dtype, parent=None)

        def apply(params, x, constants):
            return block.apply({"params": params}, x, *constants)

        return checkpointed(apply, SAVED_OUTPUTS)(layer.variables["params"], x, constants)

    def __call__(self, input_ids, positions=None, segment_ids=None):
        hidden = self.hidden_states(input_ids, positions, segment_ids)
        matrix = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = jnp.einsum(
            "BTD,VD->BTV",
            hidden,
            matrix.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits

    def output_matrix(self, params):
        """The `[V, D]` matrix that turns hidden states into logits."""
        return params["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]
