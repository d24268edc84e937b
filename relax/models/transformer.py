"""A decoder-only transformer: norms, rotary positions, grouped-query attention, gated feed-forward.

One block serves every family: what tells them apart is in `TransformerConfig`.

Axes: B batch, T query, S key, D model, F feed-forward, N query heads, K key-value heads,
G = N / K heads per key-value head, H head, L layer, V vocabulary; M = B * T tokens.

Every matrix product sees its tokens flattened to [M, D]. XLA's backward pass for CPUs is about
twice as fast on them as on [B, T, D], and accelerators do not tell the two apart.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from relax import parallel
from relax.models import cache as kv_cache
from relax.models import kernels
from relax.models.attention import attention_mask
from relax.models.config import LayerSpec, LoRA, TransformerConfig
from relax.models.layers import Linear, RMSNorm
from relax.models.moe import Experts, activation, total_aux_loss
from relax.models.remat import POLICIES, checkpointed
from relax.models.rotary import rotary_angles, rotate


class Block(nn.Module):
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x)); or norms after, or both."""

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
            self.gate_proj = self._linear(c.intermediate_size, c.mlp_bias)
            self.up_proj = self._linear(c.intermediate_size, c.mlp_bias)
            self.down_proj = self._linear(c.hidden_size, c.mlp_bias)

    def _norm(self):
        c = self.config
        return RMSNorm(c.rms_norm_eps, c.norm_plus_one, self.dtype, self.param_dtype)

    def _linear(self, features, use_bias):
        return Linear(
            features,
            use_bias,
            self.config.initializer_range,
            self.dtype,
            self.param_dtype,
            self.lora,
        )

    def queries_keys_values(self, x, angles):
        """`[M, D]` -> q `[M, K, G, H]`, k and v `[M, K, H]`, q and k turned."""
        c = self.config
        M, K, H = x.shape[0], c.num_key_value_heads, c.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(M, K, -1, H), k.reshape(M, K, 1, H), v.reshape(M, K, H)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, angles), rotate(k, angles)[:, :, 0], v

    def feed_forward(self, x, real):
        if self.layer.experts:
            return self.experts(x, real)
        gate = activation(self.config.hidden_act)(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x)), None

    def __call__(self, x, angles, attention, real):
        """One layer over `[M, D]`.

        Args:
          x: `[M, D]`.
          angles: of the rotary positions, or None.
          attention: `(q, k, v) -> (out [M, N * H], kept)`, over whatever keys there are.
          real: `[M]` bool, false for padding.

        Returns:
          `[M, D]`, what `attention` keeps, and the router's sums (None without experts).
        """
        c = self.config
        h = self.attention_norm(x) if c.pre_norm else x
        h, kept = attention(*self.queries_keys_values(h, angles))
        h = self.o_proj(h)
        x = x + (self.post_attention_norm(h) if c.post_norm else h)
        h = self.mlp_norm(x) if c.pre_norm else x
        h, router = self.feed_forward(h, real)
        x = x + (self.post_mlp_norm(h) if c.post_norm else h)
        return parallel.constrain(x, "batch", None), kept, router


class Transformer(nn.Module):
    """Token ids to next-token logits.

    `model.apply({"params": params}, input_ids, positions=None, segment_ids=None)` gives the
    logits; `method="hidden_states"` stops before the vocabulary, for losses that work on chunks of
    tokens with `output_matrix(params)`; `prefill` and `decode` are for generation.

    Attributes:
      config: sizes and switches.
      dtype: of the computation; norms, softmax, rotary positions and logits stay in float32.
      param_dtype: of the parameters.
      gradient_checkpointing: keep less of each layer for the backward pass.
      gradient_checkpointing_policy: what is kept then, of `relax.models.remat.POLICIES`.
      attn_implementation: `auto`, `xla`, `cudnn` or `splash`, see `relax.models.kernels`; it holds
        for whole rows, the decode step has its own.
      lora: scale and dropout of the adapters among the parameters, if there are any.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    gradient_checkpointing_policy: str = "matmuls"
    attn_implementation: str = kernels.AUTO

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
        self.layers = [self._block(layer) for layer in c.layers]
        self.norm = RMSNorm(c.rms_norm_eps, c.norm_plus_one, self.dtype, self.param_dtype)

    def _block(self, layer, **options):
        return Block(self.config, layer, self.dtype, self.param_dtype, self.lora, **options)

    def hidden_states(self, input_ids, positions=None, segment_ids=None):
        """The last layer's normalised outputs, `[B, T, D]` in `dtype`.

        Args:
          input_ids: `[B, T]` int, each in [0, vocab_size).
          positions: `[B, T]` int, the rotary position of each token; None counts from 0.
          segment_ids: `[B, T]` int; a token attends to earlier tokens of its own segment only, so
            that several documents, or padding (segment 0), share a row. None: one segment.
        """
        return self.hidden_states_and_aux_loss(input_ids, positions, segment_ids)[0]

    def hidden_states_and_aux_loss(self, input_ids, positions=None, segment_ids=None):
        """As `hidden_states`, and the routers' load-balancing loss over all layers.

        Returns:
          `[B, T, D]`, and a float32 scalar, or None for a model without experts.
        """
        B, T = input_ids.shape
        angles = self._angles(positions, segment_ids, B, T)
        kinds = self.config.layers
        masks = {w: attention_mask(segment_ids, B, T, w) for w in {kind.window for kind in kinds}}
        real = jnp.ones((B * T,), bool) if segment_ids is None else segment_ids.reshape(-1) > 0
        x, routers = self.embed(input_ids), []
        for layer, kind in zip(self.layers, kinds, strict=True):
            over = functools.partial(_over, self._attention(kind, T, segment_ids))
            constants = (angles[kind.rope], masks[kind.window], segment_ids, real)
            x, router = self.run(layer, x, constants, over)
            routers.append(router)
        return self.norm(x).reshape(B, T, -1), total_aux_loss(routers)

    def prefill(self, input_ids):
        """Hidden states of prompts, and their keys and values.

        Args:
          input_ids: `[B, T]`; shorter prompts are padded on the right with any token.

        Returns:
          `[B, T, D]`, and per layer keys and values `[B, K, T, H]`, of which the columns past a
          prompt's end mean nothing.
        """
        B, T = input_ids.shape
        angles = self._angles(None, None, B, T)
        real = jnp.ones((B * T,), bool)
        x, filled = self.embed(input_ids), []
        for layer, kind in zip(self.layers, self.config.layers, strict=True):
            mask = attention_mask(None, B, T, kind.window)
            over = _over_row(self._attention(kind, T, None), mask, None)
            x, kept, _ = layer(x, angles[kind.rope], over, real)
            filled.append(kept)
        return self.norm(x).reshape(B, T, -1), tuple(filled)

    def decode(self, tokens, positions, cache):
        """One token more for every slot of a cache (see `relax.models.cache`).

        Args:
          tokens: `[B]`, the last token of each slot.
          positions: `[B]`, where it stands.
          cache: of `relax.models.cache`, with more columns than any position.

        Returns:
          Hidden states `[B, D]`, and the cache with the tokens' keys and values in it.
        """
        angles = self._angles(positions[:, None], None, tokens.shape[0], 1)
        real = jnp.ones(tokens.shape, bool)
        x, filled = self.embed(tokens), []
        for layer, kind, columns in zip(self.layers, self.config.layers, cache, strict=True):
            over = _over_cache(self.config, kind.window, columns, positions)
            x, kept, _ = layer(x, angles[kind.rope], over, real)
            filled.append(kept)
        return self.norm(x), tuple(filled)

    def embed(self, input_ids):
        table = parallel.gather_for_use(self.embed_tokens, "embed_tokens", dtype=self.dtype)
        x = table[input_ids.reshape(-1)].astype(self.dtype)  # [M, D]
        x = parallel.constrain(x, "batch", None)
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1.0 else x * jnp.asarray(multiplier, self.dtype)

    def _angles(self, positions, segment_ids, B, T):
        """Per kind of rope, the angles of all tokens; None for the layers without positions."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        R = self.config.rotary_dim or self.config.head_dim
        ropes = {kind.rope for kind in self.config.layers} - {None}
        angles = {rope: rotary_angles(positions, rope, R, segment_ids) for rope in ropes}
        return angles | {None: None}

    def attention_choice(self, layer, T, segments, device=None):
        """The path of a layer's attention over rows of T tokens, and why (`kernels.choose`)."""
        c = self.config
        need = kernels.AttentionSpec(
            jnp.dtype(self.dtype).name,
            c.head_dim,
            layer.window,
            c.attn_logit_softcapping,
            T,
            segments,
        )
        return kernels.choose(self.attn_implementation, need, device or kernels.this_device())

    def _attention(self, layer, T, segment_ids):
        """`(q, k, v, mask, segment_ids) -> out` over rows."""
        path, _ = self.attention_choice(layer, T, segment_ids is not None)
        options = attention_options(self.config)
        return functools.partial(kernels.attend_rows, path=path, window=layer.window, **options)

    def run(self, layer, x, constants, over):
        """`over(config, layer, x, constants) -> (x, router)`, checkpointed where that is asked."""
        if not self.gradient_checkpointing or self.is_initializing():
            return over(self.config, layer, x, constants)
        block = self._block(layer.layer, parent=None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(params, x, constants):
            *constants, key = constants
            rngs = None if key is None else {"dropout": key}
            bound = block.bind({"params": params}, rngs=rngs)
            return over(self.config, bound, x, constants)

        constants = (*constants, key)
        policy = POLICIES[self.gradient_checkpointing_policy]
        return checkpointed(apply, policy)(layer.variables["params"], x, constants)

    def __call__(self, input_ids, positions=None, segment_ids=None):
        hidden = self.hidden_states(input_ids, positions, segment_ids)
        matrix = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = jnp.einsum(
            "BTD,VD->BTV",
            hidden,
            matrix.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def output_matrix(self, params):
        """The `[V, D]` matrix that turns hidden states into logits."""
        return params["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]


def _over(attend, config, layer, x, constants):
    """A layer over whole rows: `(x, router)`."""
    angles, mask, segment_ids, real = constants
    x, _, router = layer(x, angles, _over_row(attend, mask, segment_ids, keep=False), real)
    return x, router


def attention_options(config):
    """How queries and keys become scores."""
    return {"multiplier": config.attention_multiplier, "softcap": config.attn_logit_softcapping}


def _over_row(attend, mask, segment_ids, keep=True):
    """Attention within rows `[B, T]`; keeps keys and values as a cache holds them."""
    B, T = mask.shape[:2]

    def attention(q, k, v):
        q, k, v = (x.reshape(B, T, *x.shape[1:]) for x in (q, k, v))
        out = attend(q, k, v, mask, segment_ids).reshape(B * T, -1)
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2)) if keep else None

    return attention


def _over_cache(config, window, columns, positions):
    """Attention of one new token per slot to the columns of a cache, itself included."""

    def over_part(q, k, v, columns, positions):
        keys, values = (
            kv_cache.write(old, new, positions) for old, new in zip(columns, (k, v), strict=True)
        )
        out = kv_cache.attend_cached(
            q, keys, values, positions, window=window, **attention_options(config)
        )
        return out, (keys, values)

    def attention(q, k, v):
        heads = ("batch", "heads")
        run = parallel.per_device(
            over_part, (heads, heads, heads, heads, ("batch",)), (heads, (heads, heads))
        )
        out, kept = run(q, k, v, columns, positions)
        return out.reshape(out.shape[0], -1), kept

    return attention
