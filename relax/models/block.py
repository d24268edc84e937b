"""One layer of the transformer: norms and the feed-forward block around a sequence mixer.

Axes: M tokens of all rows, flattened; D model, F feed-forward.
"""

from typing import Any

import flax.linen as nn
import jax

from relax import parallel
from relax.models.layers import XIELU, LayerPart
from relax.models.mixers import MIXERS, Context
from relax.models.moe import Experts, activation


class Block(LayerPart):
    """One layer: x += mixer(norm(x)); x += feed_forward(norm(x)).

    Norms are before the two blocks, after them, or both (`pre_norm`, `post_norm`). Where tokens
    have inputs of their own for each layer, e, x += norm(W_out (act(W_gate x) * e)) follows. The
    output may have a factor, which is not trained, as it is not in transformers.
    """

    attn_implementation: str = "auto"

    def setup(self):
        c, width = self.config, self.layer.intermediate_size
        self.mixer = MIXERS[self.layer.mixer](
            c, self.layer, self.dtype, self.param_dtype, self.lora, self.attn_implementation
        )
        nn.share_scope(self, self.mixer)  # paths of parameters do not name the mixer
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = self.norm(), self.norm()
        if c.post_norm:
            self.post_attention_norm, self.post_mlp_norm = self.norm(), self.norm()
        if self.layer.experts:
            self.experts = Experts(c, self.dtype, self.param_dtype, self.lora)
        else:
            if c.gated_mlp:
                self.gate_proj = self.linear(width, c.mlp_bias)
            self.up_proj = self.linear(width, c.mlp_bias)
            self.down_proj = self.linear(c.hidden_size, c.mlp_bias)
            if c.hidden_act == "xielu":
                self.act_fn = XIELU(self.dtype, self.param_dtype)
        if c.hidden_size_per_layer_input:
            self.per_layer_input_gate = self.linear(c.hidden_size_per_layer_input, False)
            self.per_layer_projection = self.linear(c.hidden_size, False)
            self.post_per_layer_input_norm = self.norm()
        if c.layer_scalar:
            init = nn.initializers.ones
            self.layer_scalar = self.param("layer_scalar", init, (1,), self.param_dtype)

    def __call__(self, x: jax.Array, context: Context, state: Any = None, own_input=None):
        """Applies the layer to all tokens at once.

        Args:
          x: `[M, D]`.
          context, state: see `relax.models.mixers.base`.
          own_input: `[M, P]`, the tokens' inputs for this layer; None: there are none.

        Returns:
          `[M, D]`, the mixer's new state, and the router's sums (None without experts).
        """
        c = self.config
        h, state = self.mixer(self.attention_norm(x) if c.pre_norm else x, context, state)
        x = x + c.residual_multiplier * (self.post_attention_norm(h) if c.post_norm else h)
        h = self.mlp_norm(x) if c.pre_norm else x
        h, router = self.feed_forward(h, context.real.reshape(-1))
        x = x + c.residual_multiplier * (self.post_mlp_norm(h) if c.post_norm else h)
        if own_input is not None:
            h = activation(c.hidden_act)(self.per_layer_input_gate(x)) * own_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(h))
        if c.layer_scalar:
            x = x * jax.lax.stop_gradient(self.layer_scalar).astype(x.dtype)[None, :]
        return parallel.constrain(x, "batch", None), state, router

    def feed_forward(self, x, real):
        """`[M, D]` -> `[M, D]`, and the router's sums.

        (act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down without a gate.
        """
        if self.layer.experts:
            return self.experts(x, real)
        c, up = self.config, self.up_proj(x)
        act = self.act_fn if c.hidden_act == "xielu" else activation(c.hidden_act)
        return self.down_proj(act(self.gate_proj(x)) * up if c.gated_mlp else act(up)), None
