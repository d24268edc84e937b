"""Configuration of a decoder-only transformer, frozen and hashable for compiled functions."""

import dataclasses
import math
import re

from relax.models.rope import Rope, RopeScaling


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters on linear layers: y = x W + dropout(x) A B · s.

    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1; Kalajdzievski,
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, for `use_rslora`; Liu et
    al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, for `use_dora`.

    Attributes:
      r: rank of A [in, r] and B [r, out].
      alpha: the adapters' output is scaled by s = alpha / r.
      dropout: dropout rate of the adapters' inputs in training.
      target_modules: names of the linear layers that have adapters, such as `q_proj`.
      use_rslora: s = alpha / √r instead.
      use_dora: train the norm of each output's weights, and by A B their direction alone.
      rank_pattern, alpha_pattern: pairs of a regular expression and the r or alpha of the modules
        whose names, such as `model.layers.0.self_attn.q_proj`, it fits from some dot to the end;
        the first one counts.
      modules_to_save: ends of names of modules that are trained in full beside the adapters.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The factor s of A B where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def of_module(self, name: str) -> "LoRA":
        """The settings of one module, without patterns.

        >>> LoRA(r=8, alpha=8.0, rank_pattern=(("q_proj", 4),)).of_module("layers.0.q_proj").scale
        2.0
        """

        def first(pattern, default):
            fits = (value for key, value in pattern if re.match(rf"(.*\.)?({key})$", name))
            return next(fits, default)

        r, alpha = first(self.rank_pattern, self.r), first(self.alpha_pattern, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern=(), alpha_pattern=())

    def is_saved(self, module: str) -> bool:
        """Whether a module is trained in full."""
        return module.endswith(self.modules_to_save)


# The sequence mixer of each type of layer.
MIXER_OF = {
    "full_attention": "attention",
    "sliding_attention": "attention",
    "conv": "convolution",
    "linear_attention": "delta",
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Settings that may differ from layer to layer.

    Attributes:
      window: a token sees itself and `window - 1` earlier tokens; None: all earlier ones.
      rope: rotary positions; None: no positions.
      experts: whether a mixture of experts replaces the feed-forward block.
      mixer: the sequence mixer, of `relax.models.mixers.MIXERS`.
      head_dim, kv_heads: width of attention's heads, and how many heads keys and values have.
      intermediate_size: width of the feed-forward block.
      source: the earlier layer whose keys and values this one attends to; None: its own.
      keys_are_values: whether values are the projections to keys.
    """

    window: int | None
    rope: Rope | None
    experts: bool
    mixer: str = "attention"
    head_dim: int = 0
    kv_heads: int = 0
    intermediate_size: int = 0
    source: int | None = None
    keys_are_values: bool = False


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Configuration of `relax.models.Transformer`, with Hugging Face's names where they exist.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward block.
      num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: the attention stack;
        `num_key_value_heads` divides `num_attention_heads`.
      global_head_dim, num_global_key_value_heads: those of full layers; None: as in the others.
      attention_k_eq_v: whether the values of full layers are their projections to keys.
      value_norm: whether the values of each head are normalised, without a scale.
      num_kv_shared_layers: number of last layers without keys and values of their own; each attends
        to those of the last layer of its type before them.
      use_double_wide_mlp: whether the feed-forward blocks of those layers have twice the width.
      hidden_size_per_layer_input, vocab_size_per_layer_input: width and rows of a second embedding
        with a part for each layer, whose gated projection is added behind both blocks; 0: none.
      layer_scalar: whether the output of a layer is multiplied by a number, which is not trained.
      max_position_embeddings: maximum sequence length of the model.
      rope_theta, rope_scaling: base and scaling of the rotary positions.
      rotary_dim: number of first entries of a head that are rotated; None: all.
      tie_word_embeddings: whether the output matrix is the embedding.
      attention_bias, output_bias, mlp_bias: biases of the projections to queries, keys and values,
        of the output projection, and of the feed-forward block.
      initializer_range: standard deviation of initial matrices.
      model_type: the family in `relax.models.families` that defines the file format.
      hidden_act: activation of the gate, `silu`, `gelu`, `gelu_pytorch_tanh`, `relu2` or `xielu`,
        which has parameters in every layer.
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
      attention_sinks: whether each query head has one more score in its softmax, a parameter, of a
        key that all tokens see and whose value is 0.
      attn_logit_softcapping, final_logit_softcapping: c in x -> c tanh(x / c), for q · k and the
        logits; None: no cap.
      sliding_window, layer_types: layers of type `sliding_attention` see a window of the past,
        those of type `full_attention` all of it; instead of attention, those of type `conv` have a
        short gated convolution, those of type `linear_attention` a gated delta rule. Empty: all are
        full.
      local_rope_theta: base of the unscaled rotary positions in sliding layers; None: as in the
        others.
      no_rope_layers: indices of layers without positions.
      rope_backwards: whether planes turn by the negative angle.
      rope_interleaved: whether a rotated plane is two neighbours (x[2i], x[2i + 1]) instead of
        (x[i], x[i + R/2]).
      query_beta, query_length: rotated queries are multiplied by
        1 + query_beta log(1 + floor(position / query_length)).
      attention_gate: gates of attention's outputs, sigmoids of the layer's input: `entry` gives
        each entry one, computed beside the queries, `head` each head; None: no gates.
      conv_width, conv_bias: width of the kernels of convolutions, and whether those of type `conv`
        and the projections around them have biases.
      linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim:
        heads of the gated delta rule; each key head serves equally many consecutive value heads.
      num_experts, num_experts_per_tok, moe_intermediate_size: mixture of experts, where each token
        goes to the experts with the highest router probability; 0: none.
      norm_topk_prob: whether the chosen experts' weights are normalised to a sum of 1.
      expert_bias: whether the router and the experts have biases.
      swiglu_alpha, swiglu_limit: experts are (u + 1) g sigmoid(swiglu_alpha g), with g and u the
        outputs of `gate_proj` and `up_proj`, g at most swiglu_limit and u at most that in size,
        whatever `hidden_act`; None: no such experts.
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
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    value_norm: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    layer_scalar: bool = False
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
    attention_sinks: bool = False
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
    attention_gate: str | None = None
    conv_width: int = 0
    conv_bias: bool = False
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    expert_bias: bool = False
    swiglu_alpha: float = 1.702
    swiglu_limit: float | None = None
    dense_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    def __post_init__(self):
        for broken, message in self._problems():
            if broken:
                raise ValueError(message)

    def _problems(self):
        heads = self.num_attention_heads
        for kv_heads in (self.num_key_value_heads, self.num_global_key_value_heads or 1):
            yield (
                heads % kv_heads,
                f"num_key_value_heads must divide num_attention_heads, got {heads} heads and "
                f"{kv_heads} key-value heads.",
            )
        turning = self.rotary_dim
        for width in (self.head_dim, self.global_head_dim or self.head_dim):
            yield width % 2, f"rotary positions need an even head_dim, got {width}."
        yield (
            turning is not None and (turning % 2 or not 0 < turning <= self.head_dim),
            f"rotary_dim must be even and at most head_dim {self.head_dim}, got {turning}.",
        )
        types, count = self.layer_types, self.num_hidden_layers
        yield (
            types and len(types) != count,
            f"layer_types must name every layer, got {len(types)} types for {count} layers.",
        )
        unknown = sorted(set(types) - MIXER_OF.keys())
        yield unknown, f"layer_types must be of {', '.join(MIXER_OF)}, got {unknown}."
        yield (
            {"conv", "linear_attention"} & {*types} and self.conv_width < 1,
            f"layers with convolutions need conv_width of at least 1, got {self.conv_width}.",
        )
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        yield (
            "linear_attention" in types and (keys < 1 or values < 1 or values % keys),
            "linear_num_key_heads must be at least 1 and divide linear_num_value_heads, got "
            f"{keys} and {values}.",
        )
        yield (
            "sliding_attention" in types and not self.sliding_window,
            f"sliding layers need sliding_window, got {self.sliding_window}.",
        )
        yield from self._sharing_problems()
        yield (
            self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < self.vocab_size,
            "vocab_size_per_layer_input must be at least vocab_size, since every id has a row "
            f"there, got {self.vocab_size_per_layer_input} and {self.vocab_size}.",
        )
        experts, chosen = self.num_experts, self.num_experts_per_tok
        yield (
            experts and not (0 < chosen <= experts and self.moe_intermediate_size > 0),
            f"num_experts_per_tok must be from 1 to num_experts {experts}, got {chosen}, and "
            f"moe_intermediate_size above 0, got {self.moe_intermediate_size}.",
        )

    def _sharing_problems(self):
        first = self.num_hidden_layers - self.num_kv_shared_layers
        types = self._types
        lonely = sorted({*types[max(first, 0) :]} - {*types[: max(first, 0)]})
        yield (
            lonely,
            "num_kv_shared_layers must leave a layer of each type to share from, got "
            f"{self.num_kv_shared_layers} of {self.num_hidden_layers} layers and none before them "
            f"of type {', '.join(lonely)}.",
        )
        others = sorted({MIXER_OF[kind] for kind in types if kind in MIXER_OF} - {"attention"})
        yield (
            self.num_kv_shared_layers and others,
            f"num_kv_shared_layers needs attention in every layer, got {', '.join(others)}.",
        )

    @property
    def _types(self) -> tuple[str, ...]:
        return self.layer_types or ("full_attention",) * self.num_hidden_layers

    def _source(self, index: int) -> int | None:
        """The layer whose keys and values layer `index` uses instead of its own."""
        own, types = self.num_hidden_layers - self.num_kv_shared_layers, self._types
        if index < own:
            return None
        return max(i for i in range(own) if types[i] == types[index])

    @property
    def tensor_heads(self) -> int:
        """The largest number that divides the key-value heads of every layer."""
        return math.gcd(self.num_key_value_heads, self.num_global_key_value_heads or 0)

    def layer(self, index: int) -> LayerSpec:
        """The settings of layer `index`, from 0."""
        kind, source = self._types[index], self._source(index)
        sliding, mixer = kind == "sliding_attention", MIXER_OF[kind]
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
            rope=None if index in self.no_rope_layers or mixer != "attention" else rope,
            experts=self.num_experts > 0 and index not in self.dense_layers,
            mixer=mixer,
            head_dim=self.head_dim if sliding else self.global_head_dim or self.head_dim,
            kv_heads=(None if sliding else self.num_global_key_value_heads)
            or self.num_key_value_heads,
            intermediate_size=self.intermediate_size
            * (2 if self.use_double_wide_mlp and source is not None else 1),
            source=source,
            keys_are_values=self.attention_k_eq_v and not sliding,
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The settings of all layers, in order."""
        return tuple(map(self.layer, range(self.num_hidden_layers)))
