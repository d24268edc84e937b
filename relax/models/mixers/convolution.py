"""Short gated convolutions as a sequence mixer; its state is the last inputs of the convolution.

Axes: B rows or slots, T tokens, M tokens of all rows, D model, W width of the kernels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax.models.convolution import convolve, convolve_behind, convolve_next, last_inputs
from relax.models.mixers.base import Mixer


class ShortConvolution(Mixer):
    """W_out (c * convolution(b * h)), with b, c, h = W_in x.

    Its state is `[B, D, W - 1]`. Liquid AI, LFM2 Technical Report, 2025, section 2.
    """

    def setup(self):
        c = self.config
        self.in_proj = self.linear(3 * c.hidden_size, c.conv_bias)
        self.out_proj = self.linear(c.hidden_size, c.conv_bias)
        self.conv = DepthwiseKernels(
            c.hidden_size, c.conv_width, c.conv_bias, c.initializer_range, self.param_dtype
        )

    def __call__(self, x, context, state):
        before, after, h = jnp.split(self.in_proj(x), 3, axis=-1)
        y, state = self.conv(before * h, context, state)
        return self.out_proj(after * y.astype(self.dtype)), state

    @staticmethod
    def empty_state(config, layer, B, S, dtype):
        del layer, S
        return jnp.zeros((B, config.hidden_size, config.conv_width - 1), dtype)


class DepthwiseKernels(nn.Module):
    """A causal convolution with one kernel per channel, over rows or their next tokens."""

    channels: int
    width: int
    use_bias: bool
    stddev: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, state):
        """`[M, C]` -> `[M, C]` float32, and the state `[B, C, W - 1]`, as a `Mixer` does it."""
        init, shape = nn.initializers.normal(self.stddev), (self.channels, 1, self.width)
        weight = self.param("weight", init, shape, self.param_dtype)
        if state is None:
            B, T = context.real.shape
            x = x.reshape(B, T, -1)
            y = convolve(x, weight, context.segment_ids, context.parent_ids).reshape(B * T, -1)
            state = last_inputs(x, context.real.sum(axis=1), self.width)
        elif context.real.shape[1] == 1:
            y, state = convolve_next(x, weight, state)
        else:
            y, state = convolve_behind(
                x.reshape(*context.real.shape, -1), weight, state, context.real
            )
        if self.use_bias:
            bias: jax.Array = self.param(
                "bias", nn.initializers.zeros, (self.channels,), self.param_dtype
            )
            y += bias.astype(jnp.float32)[None, :]
        return y, state
