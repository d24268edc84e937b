"""Configuration of a decoder-only transformer, frozen and hashable for compiled functions."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the original training length of a model.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `ntk` multiplies the base by
        factor^(R / (R - 2)), R the rotated entries of a head; `llama3` divides the low frequencies
        only and blends between `low_freq_factor` and `high_freq_factor` (wavelengths in units of
        `original_max_position_embeddings`); `yarn` blends between the planes that rotate
        `beta_fast` and `beta_slow` times; in documents longer than
        `original_max_position_embeddings`, `dynamic` raises the base, and `longrope` uses
        `long_factor` instead of `short_factor`.
      attention_factor: multiplies cosines and sines (yarn, longrope).
      short_factor, long_factor: one divisor per plane (longrope).
      truncate: whether the blend of yarn starts and ends at whole planes.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its document."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i/R), scaled by `scaling`.

    With `backwards` planes turn by the negative angle.
    Queries are also multiplied by 1 + query_beta log(1 + floor(position / query_length)).
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    query_beta: float = 0.0
    query_length: int = 1
    backwards: bool = False


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters on linear layers: y = x W + dropout(x) A B · alpha / r.

    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.

    Attributes:
      r: rank of A [in, r] and B [r, out].
      alpha: the adapters' output is scaled by alpha / r.
      dropout: dropout rate of the adapters' inputs in training.
      target_modules: names of the linear layers that have adapters, such as `q_proj`.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Settings that may differ from layer to layer.

    Attributes:
      window: a token sees itself and `window - 1` earlier tokens; None: all earlier ones.
      rope: rotary positions; None: no positions.
      experts: whether a mixture of experts replaces the feed-forward block.
    """

    window: int | None
    rope: Rope | None
    experts: bool


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Configuration of `relax.models.Transformer`, with Hugging Face's names where they exist.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward block.
      num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: the attention stack;
        `num_key_value_heads` divides `num_attention_heads`.
      max_position_embeddings: maximum sequence length of the model.
      rope_theta, rope_scaling: base and scaling of the rotary positions.
      rotary_dim: number of first entries of a head that are rotated; None: all.
      tie_word_embeddings: whether the output matrix is the embedding.
      attention_bias, output_bias, mlp_bias: biases of the projections to queries, keys and values,
        of the output projection, and of the feed-forward block.
      initializer_range: standard deviation of initial matrices.
      model_type: the family in `relax.models.families` that defines the file format.
      hidden_act: activation of the gate, `silu`, `gelu`, `gelu_pytorch_tanh` or `relu2`.
      gated_mlp: whether the feed-forward block has a gate; else the activation is that of
        `up_proj`.
      norm_plus_one: norms multiply by 1 + scale.
      norm_scale: whether norms have a scale at all.
      embedding_norm: whether the embeddings are normalised.
      pre_norm, post_norm: norms before and after the two blocks of a layer.
      qk_norm: norm of queries and keys: `head` normalises each head, `all` all heads together,
        both before rotation; `rotated` normalises each head after it; None: no norm.
      embedding_multiplier, residual_multiplier: factors of the embeddings, and of the outputs of
        both blocks of a layer.
      logits_scaling: divisor of the logits.
      attention_multiplier: factor of q · k; None: head_dim^-0.5.
      attn_logit_softcapping, final_logit_softcapping: c in x -> c tanh(x / c), for q · k and the
        logits; None: no cap.
      sliding_window, layer_types: layers of type `sliding_attention` see a window of the past,
        those of type `full_attention` all of it. Empty: all are full.
      local_rope_theta: base of the unscaled rotary positions in sliding layers; None: as in the
        others.
      no_rope_layers: indices of layers without positions.
      rope_backwards: whether planes turn by the negative angle.
      rope_interleaved: whether a rotated plane is two neighbours (x[2i], x[2i + 1]) instead of
        (x[i], x[i + R/2]).
      query_beta, query_length: rotated queries are multiplied by
        1 + query_beta log(1 + floor(position / query_length)).
      num_experts, num_experts_per_tok, moe_intermediate_size: mixture of experts, where each token
        goes to the experts with the highest router probability; 0: none.
      norm_topk_prob: whether the chosen experts' weights are normalised to a sum of 1.
      dense_layers: indices of layers with a feed-forward block instead of experts.
      router_aux_loss_coef: coefficient of the load-balancing loss in training.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"
    hidden_act: str = "silu"
    gated_mlp: bool = True
    rotary_dim: int | None = None
    norm_plus_one: bool = False
    norm_scale: bool = True
    embedding_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    local_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    rope_backwards: bool = False
    rope_interleaved: bool = False
    query_beta: float = 0.0
    query_length: int = 1
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    def __post_init__(self):
        for broken, message in self._problems():
            if broken:
                raise ValueError(message)

    def _problems(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        yield (
            heads % kv_heads,
            f"num_key_value_heads must divide num_attention_heads, got {heads} heads and "
            f"{kv_heads} key-value heads.",
        )
        turning = self.rotary_dim
        yield self.head_dim % 2, f"rotary positions need an even head_dim, got {self.head_dim}."
        yield (
            turning is not None and (turning % 2 or not 0 < turning <= self.head_dim),
            f"rotary_dim must be even and at most head_dim {self.head_dim}, got {turning}.",
        )
        types, count = self.layer_types, self.num_hidden_layers
        yield (
            types and len(types) != count,
            f"layer_types must name every layer, got {len(types)} types for {count} layers.",
        )
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        yield unknown, f"layer_types must be full_attention or sliding_attention, got {unknown}."
        yield (
            "sliding_attention" in types and not self.sliding_window,
            f"sliding layers need sliding_window, got {self.sliding_window}.",
        )
        experts, chosen = self.num_experts, self.num_experts_per_tok
        yield (
            experts and not (0 < chosen <= experts and self.moe_intermediate_size > 0),
            f"num_experts_per_tok must be from 1 to num_experts {experts}, got {chosen}, and "
            f"moe_intermediate_size above 0, got {self.moe_intermediate_size}.",
        )

    def layer(self, index: int) -> LayerSpec:
        """The settings of layer `index`, from 0."""
        sliding = bool(self.layer_types) and self.layer_types[index] == "sliding_attention"
        rope = Rope(
            self.rope_theta,
            self.rope_scaling,
            self.query_beta,
            self.query_length,
            self.rope_backwards,
        )
        if sliding and self.local_rope_theta is not None:
            rope = dataclasses.replace(rope, theta=self.local_rope_theta, scaling=None)
        return LayerSpec(
            window=self.sliding_window if sliding else None,
            rope=None if index in self.no_rope_layers else rope,
            experts=self.num_experts > 0 and index not in self.dense_layers,
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The settings of all layers, in order."""
        return tuple(map(self.layer, range(self.num_hidden_layers)))
