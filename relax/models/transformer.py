"""A decoder-only transformer; one block serves every family, configured by `TransformerConfig`.

Notable features:
- grouped-query attention, in full or in a sliding window, layer by layer; soft caps
- rotary positions on all of a head, a part of it, or in no layer; stretched in seven ways
- RMS norms before the blocks, behind them, or both, and of queries and keys
- feed-forward blocks with a gate or without, or a mixture of experts that drops no token
- tied or untied embeddings; the logits of a whole batch never exist in training
- sequence mixers behind one interface (`relax.models.mixers`): rows of several documents
  (`segment_ids`) that may share their beginnings (`parent_ids`), and a cache (`prefill`, `decode`),
  run through the same layers
- keys and values that later layers share, and inputs that tokens have for each layer
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
from relax.models import kernels
from relax.models.attention import attention_mask
from relax.models.block import Block
from relax.models.config import LayerSpec, LoRA, TransformerConfig
from relax.models.layers import SCALE_UNKNOWN, RMSNorm, adapter_scale, matmul
from relax.models.mixers import Context
from relax.models.moe import total_aux_loss
from relax.models.per_layer import PerLayerInputs
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
      cast_lm_head_to_fp32: hidden states are float32, whatever the dtype of the computation, and so
        is their product with the output matrix.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    gradient_checkpointing_policy: str = "matmuls"
    attn_implementation: str = kernels.AUTO
    cast_lm_head_to_fp32: bool = False

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
            param_dtype=self.param_dtype,
            has_scale=c.norm_scale,
        )
        head_dtype = jnp.float32 if self.cast_lm_head_to_fp32 else self.dtype
        self.norm = norm(dtype=head_dtype, multiplier=1 / c.logits_scaling)
        if c.embedding_norm:
            self.embed_norm = norm(dtype=self.dtype)
        if c.hidden_size_per_layer_input:
            self.own_inputs = PerLayerInputs(c, self.dtype, self.param_dtype, self.lora)
            nn.share_scope(self, self.own_inputs)

    def _block(self, layer, **options):
        return Block(
            self.config,
            layer,
            self.dtype,
            self.param_dtype,
            self.lora,
            self.attn_implementation,
            **options,
        )

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
        self, input_ids, positions=None, segment_ids=None, parent_ids=None, noise=None
    ):
        """Hidden states, and the routers' load-balancing loss over all layers.

        Args:
          noise: `[B, T, D]`, added to the embeddings; None: none.

        Returns:
          `[B, T, D]`, and a float32 scalar, or None for a model without experts.
        """
        if parent_ids is not None and (positions is None or segment_ids is None):
            raise ValueError(
                "parent_ids need positions and segment_ids, since a child's positions continue "
                "from its parent's: pass all three."
            )
        B, T = input_ids.shape
        contexts = self._contexts(B, T, positions, segment_ids, parent_ids)
        x = self.embed(input_ids)
        x = x if noise is None else x + noise.reshape(x.shape).astype(x.dtype)
        run = self._layer if self.is_initializing() else self.run
        x, _, routers = self._through(input_ids, x, contexts, run)
        return self.norm(x).reshape(B, T, -1), total_aux_loss(routers)

    def prefill_packed(self, input_ids, positions, segment_ids, parent_ids):
        """As `prefill`, of the rows of a packed forest (`relax.data.forest`).

        Returns:
          `[B, T, D]`, and per layer its keys and values `[B, K, T, H]`; other mixers' states mean
          nothing.
        """
        B, T = input_ids.shape
        contexts = self._contexts(B, T, positions, segment_ids, parent_ids)
        x, states, _ = self._through(input_ids, self.embed(input_ids), contexts)
        return self.norm(x).reshape(B, T, -1), tuple(states)

    def prefill(self, input_ids, lengths):
        """Hidden states of prompts, and the state behind each.

        Args:
          input_ids: `[B, T]`; shorter prompts are padded on the right with any token.
          lengths: `[B]` int, of the prompts.

        Returns:
          `[B, T, D]`, and per layer the state of its mixer. Keys and values `[B, K, T, H]` mean
          nothing past a prompt's end.
        """
        B, T = input_ids.shape
        angles, masks = self._angles(None, None, B, T), self._masks(B, T)
        real = jnp.arange(T)[None, :] < lengths[:, None]
        contexts = {kind: Context(real, angles[kind], masks[kind]) for kind in self.config.layers}
        x, states, _ = self._through(input_ids, self.embed(input_ids), contexts)
        return self.norm(x).reshape(B, T, -1), tuple(states)

    def decode(self, tokens, positions, cache):
        """Decodes one token for every slot of a cache (see `relax.models.cache`).

        Args:
          tokens: `[B]`, the last token of each slot.
          positions: `[B]`, its position.
          cache: a cache of `relax.models.cache`, with more columns than any position.

        Returns:
          Hidden states `[B, D]`, and the cache with the tokens in it.
        """
        real = jnp.ones((tokens.shape[0], 1), bool)
        return self._continue(tokens[:, None], positions[:, None], real, cache)

    def extend(self, input_ids, starts, lengths, cache):
        """Appends several tokens to every slot of a cache, as `decode` does one.

        Args:
          input_ids: `[B, T]`; rows with fewer new tokens are padded on the right with any token.
          starts: `[B]` int, the position of each slot's first new token.
          lengths: `[B]` int, its new tokens; 0 leaves a slot as it is.
          cache: a cache with more columns than any position.

        Returns:
          Hidden states `[B, T, D]`, and the cache with the tokens in it.
        """
        B, T = input_ids.shape
        places = jnp.arange(T)[None, :]
        real = places < lengths[:, None]
        x, cache = self._continue(input_ids, starts[:, None] + places, real, cache)
        return x.reshape(B, T, -1), cache

    def _continue(self, input_ids, positions, real, cache):
        """New tokens `[B, T]` behind those of a cache: hidden states `[B * T, D]`, the cache."""
        angles = self._angles(positions, None, *input_ids.shape)
        contexts = {
            kind: Context(real, angles[kind], positions=positions) for kind in self.config.layers
        }
        x, states, _ = self._through(input_ids, self.embed(input_ids), contexts, cache=cache)
        return self.norm(x), tuple(states)

    def embed(self, input_ids):
        table = parallel.gather_for_use(self.embed_tokens, "embed_tokens", dtype=self.dtype)
        x = table[input_ids.reshape(-1)].astype(self.dtype)  # [M, D]
        if self.has_variable("params", "embed_tokens_lora_a"):
            x = x + self._embedding_adapter(input_ids.reshape(-1))
        x = parallel.constrain(x, "batch", None)
        if self.config.embedding_norm:
            x = self.embed_norm(x)
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1.0 else x * jnp.asarray(multiplier, self.dtype)

    def _embedding_adapter(self, ids):
        """What the adapter of the embeddings adds to those of tokens `[M]`: A[ids] B · s."""
        if self.lora is None:
            raise ValueError(SCALE_UNKNOWN)
        a: jax.Array = self.get_variable("params", "embed_tokens_lora_a")  # [V, r]
        b: jax.Array = self.get_variable("params", "embed_tokens_lora_b")  # [r, D]
        scale = adapter_scale(self, "embed_tokens_lora_scale", self.lora)
        return matmul(a[ids].astype(self.dtype), b.astype(self.dtype)) * scale

    def _angles(self, positions, segment_ids, B, T) -> dict[LayerSpec, Angles | None]:
        """The angles of all tokens for each kind of layer; None for those without positions."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        return all_angles(self.config, positions, segment_ids)

    def _contexts(self, B, T, positions, segment_ids, parent_ids) -> dict[LayerSpec, Context]:
        """The context of whole rows for each kind of layer."""
        angles = self._angles(positions, segment_ids, B, T)
        masks = self._masks(B, T, segment_ids, parent_ids, positions)
        real = jnp.ones((B, T), bool) if segment_ids is None else segment_ids > 0
        return {
            kind: Context(real, angles[kind], masks[kind], segment_ids, parent_ids)
            for kind in self.config.layers
        }

    def _masks(self, B, T, segment_ids=None, parent_ids=None, positions=None):
        """The mask of each kind of layer; None for those without attention."""
        windows = {kind.window for kind in self.config.layers if kind.mixer == "attention"}
        masks = {
            window: attention_mask(segment_ids, B, T, window, parent_ids, positions)
            for window in windows
        }
        return {
            kind: masks[kind.window] if kind.mixer == "attention" else None
            for kind in self.config.layers
        }

    def _through(self, input_ids, x, contexts, run=None, cache=None):
        """Runs all layers.

        Args:
          input_ids: of the tokens.
          x: `[M, D]`, their embeddings.
          contexts: of each kind of layer.
          run: `run(index, x, context, state, own_input)` runs a layer; None: `_layer`.
          cache: the states before the tokens; None: they begin with nothing.

        Returns:
          `[M, D]`, and per layer the state of its mixer and the router's sums.
        """
        run, c = run or self._layer, self.config
        inputs = self.own_inputs(input_ids, x) if c.hidden_size_per_layer_input else None
        states: list[Any] = []
        routers = []
        for i, kind in enumerate(c.layers):
            before = None if cache is None else cache[i]
            before = before if kind.source is None else states[kind.source]
            own = None if inputs is None else inputs[:, i]
            x, state, router = run(i, x, contexts[kind], before, own)
            states.append(state)
            routers.append(router)
        return x, states, routers

    def _layer(self, index: int, *inputs):
        return self.layers[index](*inputs)

    def run(self, index: int, x: jax.Array, context: Context, state, own_input):
        """Runs a layer over whole rows, recomputed in the backward pass with checkpointing.

        Its state is returned where another layer attends to it.
        """
        layer = self.layers[index]
        if not self.gradient_checkpointing:
            return layer(x, context, state, own_input)
        block = self._block(layer.layer, parent=None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        is_source = any(kind.source == index for kind in self.config.layers)

        def apply(params, inputs, constants):
            (x, state, own_input), (context, key) = inputs, constants
            rngs = None if key is None else {"dropout": key}
            x, state, router = block.apply(
                {"params": params}, x, context, state, own_input, rngs=rngs
            )
            return x, (state if is_source else None, router)

        run = checkpointed(apply, POLICIES[self.gradient_checkpointing_policy])
        x, others = run(layer.variables["params"], (x, state, own_input), (context, key))
        return x, *others

    def outline(self, input_ids, layers):
        """Runs some layers alone, whose parameters `init` then makes; for the shapes of those."""
        angles, masks = self._angles(None, None, *input_ids.shape), self._masks(*input_ids.shape)
        real = jnp.ones(input_ids.shape, bool)
        contexts = {kind: Context(real, angles[kind], masks[kind]) for kind in self.config.layers}

        def run(index, x, *others):
            return self.layers[index](x, *others) if index in layers else (x, None, None)

        return self.norm(self._through(input_ids, self.embed(input_ids), contexts, run)[0])

    def __call__(self, input_ids, positions=None, segment_ids=None, parent_ids=None):
        hidden = self.hidden_states(input_ids, positions, segment_ids, parent_ids)
        matrix = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = jnp.einsum(
            "BTD,VD->BTV",
            hidden,
            matrix.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def output_matrix(self, params):
        """The `[V, D]` matrix that turns hidden states into logits."""
        return params["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]


def all_angles(
    config: TransformerConfig, positions: jax.Array, segment_ids: jax.Array | None = None
) -> dict[LayerSpec, Angles | None]:
    """The angles of tokens at `positions` `[B, T]` for each kind of layer in a model."""

    @functools.cache
    def angles(rope, R):
        return None if rope is None else rotary_angles(positions, rope, R, segment_ids)

    return {kind: angles(kind.rope, config.rotary_dim or kind.head_dim) for kind in config.layers}
