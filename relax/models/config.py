"""The shape of a decoder-only transformer, as one frozen value that a compiled step can hold."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained on.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `llama3` divides the low ones only and
        blends between `low_freq_factor` and `high_freq_factor` (wavelengths in units of
        `original_max_position_embeddings`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of `relax.models.Transformer`, with the names of Hugging Face configs.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU block.
      num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: the attention stack;
        `num_key_value_heads` divides `num_attention_heads`.
      max_position_embeddings: the longest sequence the model was made for.
      rope_theta, rope_scaling: base and stretching of the rotary positions.
      tie_word_embeddings: the output matrix is the embedding.
      attention_bias, mlp_bias: biases on the projections of the two blocks.
      initializer_range: standard deviation of fresh matrices.
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
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads, got "
                f"{self.num_attention_heads} heads and {self.num_key_value_heads} key-value heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}.")
