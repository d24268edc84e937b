"""A decoder-only transformer; one block serves every family, configured by `TransformerConfig`.

Notable features:
- grouped-query attention, in full or in a sliding window, layer by layer; soft caps
- rotary positions on all of a head, a part of it, or in no layer; stretched in six ways
- RMS norms before the blocks, behind them, or both, and of queries and keys
- feed-forward blocks with a gate or without, or a mixture of experts that drops no token
- tied or untied embeddings; the logits of a whole batch never exist in training
- rows of several documents (`segment_ids`) that may share their beginnings (`parent_ids`), and a
  key-value cache (`prefill`, `decode`), run through the same layers, with another `Attend` each
- low-rank adapters beside any matrix; gradient checkpointing that works on CPUs too
- norms, softmax, positions and logits in float32, whatever the dtype of the matrices

Axes: B batch, T query, S key, D model, K key-value heads, H head, L layer, V vocabulary;
M = B * T tokens. Layers see their tokens flattened, `[M, D]`: XLA's backward pass for CPUs is about
twice as fast on them as on `[B, T, D]`, and equally fast on accelerators.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models import cache as kv_cache
from relax.models import kernels
from relax.models.attention import attention_mask
from relax.models.block import Attend, Block, Context
from relax.models.config import LayerSpec, LoRA, Rope, TransformerConfig
from relax.models.layers import RMSNorm
from relax.models.moe import total_aux_loss
from relax.models.remat import POLICIES, checkpointed
from relax.models.rotary import Angles, rotary_angles


class Transformer(nn.Module):
    """Token ids to next-token logits.

    `model.apply({"params": params}, input_ids, positions=None, segment_ids=None)` gives the
    logits; `method="hidden_states"` stops before the vocabulary, for losses that work on chunks of
    tokens with `output_matrix(params)`; `prefill` and `decode` are for generation. `hidden_states`
    describes the arguments.

    Attributes:
      config: sizes and switches.
      dtype: dtype of the computation; norms, softmax, rotary positions and logits stay in float32.
      param_dtype: dtype of the parameters.
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
        # The divisor of the logits is applied here: a loss multiplies by the output matrix alone.
        norm = functools.partial(
            RMSNorm,
            c.rms_norm_eps,
            c.norm_plus_one,
            self.dtype,
            self.param_dtype,
            has_scale=c.norm_scale,
        )
        self.norm = norm(multiplier=1 / c.logits_scaling)
        if c.embedding_norm:
            self.embed_norm = norm()

    def _block(self, layer, **options):
        return Block(self.config, layer, self.dtype, self.param_dtype, self.lora, **options)

    def hidden_states(self, input_ids, positions=None, segment_ids=None, parent_ids=None):
        """The last layer's normalised outputs, divided by `logits_scaling`: `[B, T, D]` in `dtype`.

        Args:
          input_ids: `[B, T]` int, each in [0, vocab_size).
          positions: `[B, T]` int, the rotary position of each token; None counts from 0.
          segment_ids: `[B, T]` int; a token attends to earlier tokens of its own segment only, so
            that several documents, or padding (segment 0), share a row. None: one segment.
          parent_ids: `[B, T]` int, another segment, earlier in the row, whose tokens a token sees
            too (0: none), so that several documents share a beginning; their positions continue
            from it. None: no segment has a parent.

        Raises:
          ValueError: `parent_ids` without positions or segments.
        """
        return self.hidden_states_and_aux_loss(input_ids, positions, segment_ids, parent_ids)[0]

    def hidden_states_and_aux_loss(
        self, input_ids, positions=None, segment_ids=None, parent_ids=None
    ):
        """Hidden states, and the routers' load-balancing loss over all layers.

        Returns:
          `[B, T, D]`, and a float32 scalar, or None for a model without experts.
        """
        if parent_ids is not None and (positions is None or segment_ids is None):
            raise ValueError(
                "parent_ids need positions and segment_ids, since a child's positions continue "
                "from its parent's: pass all three."
            )
        B, T = input_ids.shape
        angles = self._angles(positions, segment_ids, B, T)
        kinds = self.config.layers
        masks = {
            window: attention_mask(segment_ids, B, T, window, parent_ids, positions)
            for window in {kind.window for kind in kinds}
        }
        attends = {
            kind.window: self._within_rows(kind, T, segment_ids, parent_ids) for kind in kinds
        }
        real = jnp.ones((B * T,), bool) if segment_ids is None else segment_ids.reshape(-1) > 0
        x, routers = self.embed(input_ids), []
        for layer, kind in zip(self.layers, kinds, strict=True):
            context = Context(angles[kind.rope], real, masks[kind.window], segment_ids)
            x, router = self.run(layer, x, context, attends[kind.window])
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
            context = Context(angles[kind.rope], real, attention_mask(None, B, T, kind.window))
            x, kept, _ = layer(x, context, self._within_rows(kind, T, None))
            filled.append(kept)
        return self.norm(x).reshape(B, T, -1), tuple(filled)

    def decode(self, tokens, positions, cache):
        """Decodes one token for every slot of a cache (see `relax.models.cache`).

        Args:
          tokens: `[B]`, the last token of each slot.
          positions: `[B]`, its position.
          cache: a cache of `relax.models.cache`, with more columns than any position.

        Returns:
          Hidden states `[B, D]`, and the cache with the tokens' keys and values in it.
        """
        angles = self._angles(positions[:, None], None, tokens.shape[0], 1)
        real = jnp.ones(tokens.shape, bool)
        x, filled = self.embed(tokens), []
        for layer, kind, columns in zip(self.layers, self.config.layers, cache, strict=True):
            attend = functools.partial(
                _to_cache, self.config, kind.window, columns=columns, positions=positions
            )
            x, kept, _ = layer(x, Context(angles[kind.rope], real), attend)
            filled.append(kept)
        return self.norm(x), tuple(filled)

    def embed(self, input_ids):
        table = parallel.gather_for_use(self.embed_tokens, "embed_tokens", dtype=self.dtype)
        x = table[input_ids.reshape(-1)].astype(self.dtype)  # [M, D]
        x = parallel.constrain(x, "batch", None)
        if self.config.embedding_norm:
            x = self.embed_norm(x)
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1.0 else x * jnp.asarray(multiplier, self.dtype)

    def _angles(self, positions, segment_ids, B, T) -> dict[Rope | None, Angles | None]:
        """The angles of all tokens for each kind of rope; None for layers without positions."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        return all_angles(self.config, positions, segment_ids)

    def attention_choice(self, layer, T, segments, parents=False, device=None):
        """The attention implementation of a layer for rows of T tokens, see `kernels.choose`."""
        c = self.config
        need = kernels.AttentionSpec(
            jnp.dtype(self.dtype).name,
            c.head_dim,
            layer.window,
            c.attn_logit_softcapping,
            T,
            segments,
            parents,
        )
        return kernels.choose(self.attn_implementation, need, device or kernels.this_device())

    def _within_rows(self, layer: LayerSpec, T: int, segment_ids, parent_ids=None) -> Attend:
        path, _ = self.attention_choice(layer, T, segment_ids is not None, parent_ids is not None)
        options = attention_options(self.config)
        return functools.partial(_within_rows, path=path, window=layer.window, **options)

    def run(self, layer: Block, x: jax.Array, context: Context, attend: Attend):
        """Runs a layer, `(x, router)`, recomputed in the backward pass with checkpointing."""
        if not self.gradient_checkpointing or self.is_initializing():
            x, _, router = layer(x, context, attend)
            return x, router
        block = self._block(layer.layer, parent=None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(params, x, constants):
            context, key = constants
            rngs = None if key is None else {"dropout": key}
            x, _, router = block.apply({"params": params}, x, context, attend, rngs=rngs)
            return x, router

        policy = POLICIES[self.gradient_checkpointing_policy]
        return checkpointed(apply, policy)(layer.variables["params"], x, (context, key))

    def __call__(self, input_ids, positions=None, segment_ids=None, parent_ids=None):
        hidden = self.hidden_states(input_ids, positions, segment_ids, parent_ids)
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


def all_angles(
    config: TransformerConfig, positions: jax.Array, segment_ids: jax.Array | None = None
) -> dict[Rope | None, Angles | None]:
    """The angles of tokens at `positions` `[B, T]` for each kind of rope in a model, and None."""
    R = config.rotary_dim or config.head_dim
    angles: dict[Rope | None, Angles | None] = {None: None}
    for rope in {kind.rope for kind in config.layers if kind.rope is not None}:
        angles[rope] = rotary_angles(positions, rope, R, segment_ids)
    return angles


def attention_options(config: TransformerConfig) -> dict[str, Any]:
    """Options for computing scores from queries and keys."""
    return {"multiplier": config.attention_multiplier, "softcap": config.attn_logit_softcapping}


def _within_rows(q, k, v, context: Context, **options):
    """An `Attend` within rows, whose mask is `[B, T, T]`; keeps keys and values for a cache."""
    B, T = context.mask.shape[:2]
    q, k, v = (x.reshape(B, T, *x.shape[1:]) for x in (q, k, v))
    out = kernels.attend_rows(q, k, v, context.mask, context.segment_ids, **options)
    return out.reshape(B * T, -1), (k.swapaxes(1, 2), v.swapaxes(1, 2))


def _to_cache(config: TransformerConfig, window, q, k, v, context: Context, *, columns, positions):
    """An `Attend` of one new token per slot to the columns of a cache, itself included."""

    def part(q, k, v, columns, positions):
        old_keys, old_values = columns
        keys = kv_cache.write(old_keys, k, positions)
        values = kv_cache.write(old_values, v, positions)
        options = attention_options(config)
        out = kv_cache.attend_cached(q, keys, values, positions, window=window, **options)
        return out, (keys, values)

    heads = ("batch", "heads")
    run = parallel.per_device(
        part, (heads, heads, heads, heads, ("batch",)), (heads, (heads, heads))
    )
    out, kept = run(q, k, v, columns, positions)
    return out.reshape(out.shape[0], -1), kept
