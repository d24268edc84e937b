"""Gated DeltaNet as a sequence mixer; its state is that of its convolution and of its heads.

Axes: B rows or slots, T tokens, M tokens of all rows, D model, H value heads, K entries of a key,
V of a value; C channels of the convolution, W width of its kernels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.delta import delta_rule, delta_step
from relax.models.layers import RMSNorm
from relax.models.mixers.base import Mixer
from relax.models.mixers.convolution import DepthwiseKernels
from relax.models.moe import activation


class DeltaState(NamedTuple):
    """The state behind a token."""

    inputs: jax.Array  # [B, C, W - 1], the last ones of the convolution
    heads: jax.Array  # [B, H, K, V] float32


class GatedDelta(Mixer):
    """W_out (norm(o) * silu(W_z x)), with o of `relax.models.delta`.

    q, k, v = act(convolution(W_qkv x)), q and k of norm 1, the scores of keys divided by sqrt(K);
    g = -exp(A_log) softplus(W_a x + dt_bias), β = sigmoid(W_b x).
    Yang et al., Gated Delta Networks, 2024, section 3.4.
    """

    def setup(self):
        c, H = self.config, self.config.linear_num_value_heads
        self.in_proj_qkv = self.linear(_channels(c), False)
        self.in_proj_z = self.linear(H * c.linear_value_head_dim, False)
        self.in_proj_b, self.in_proj_a = self.linear(H, False), self.linear(H, False)
        self.out_proj = self.linear(c.hidden_size, False)
        self.conv1d = DepthwiseKernels(
            _channels(c), c.conv_width, False, c.initializer_range, self.param_dtype
        )
        self.A_log = self.param("A_log", _log_uniform, (H,), self.param_dtype)
        self.dt_bias = self.param("dt_bias", nn.initializers.ones, (H,), self.param_dtype)
        self.gate_norm = RMSNorm(c.rms_norm_eps, False, jnp.float32, self.param_dtype)

    def __call__(self, x, context, state):
        inputs = None if state is None else state.inputs
        qkv, inputs = self.conv1d(self.in_proj_qkv(x), context, inputs)
        q, k, v = self._heads(activation(self.config.hidden_act)(qkv))
        g, beta = self._gates(x, context.real.reshape(-1, 1))
        B, T = context.real.shape
        if state is None or T > 1:
            rows = (y.reshape(B, T, *y.shape[1:]) for y in (q, k, v, g, beta))
            token, row = ("batch", None, "heads"), ("batch",)
            run = parallel.per_device(
                delta_rule, (*(token,) * 5, row, row, (*row, "heads")), (token, (*row, "heads"))
            )
            before = None if state is None else state.heads
            out, heads = run(*rows, context.segment_ids, context.parent_ids, before)
        else:
            out, heads = delta_step(q, k, v, g, beta, state.heads)
        out = self.gate_norm(out.reshape(*v.shape))
        z = self.in_proj_z(x).reshape(v.shape).astype(jnp.float32)
        out = (out * nn.silu(z)).astype(self.dtype)
        return self.out_proj(out.reshape(x.shape[0], -1)), DeltaState(inputs, heads)

    def _heads(self, qkv):
        """`[M, C]` float32 -> q and k `[M, H, K]`, v `[M, H, V]`."""
        c, H = self.config, self.config.linear_num_value_heads
        M, K, width = qkv.shape[0], c.linear_key_head_dim, _key_width(c)
        q, k, v = jnp.split(qkv, [width, 2 * width], axis=-1)
        q, k = (_unit(x.reshape(M, -1, K)) for x in (q, k))
        q, k = (jnp.repeat(x, H // c.linear_num_key_heads, axis=1) for x in (q * K**-0.5, k))
        return q, k, v.reshape(M, H, -1)

    def _gates(self, x, real):
        """g and beta, `[M, H]` float32; both 0 at padding, which leaves the state as it is."""
        a, b = (y.astype(jnp.float32) for y in (self.in_proj_a(x), self.in_proj_b(x)))
        step = jax.nn.softplus(a + self.dt_bias.astype(jnp.float32)[None])
        g = -jnp.exp(self.A_log.astype(jnp.float32)[None]) * step
        return jnp.where(real, g, 0.0), jnp.where(real, nn.sigmoid(b), 0.0)

    @staticmethod
    def empty_state(config, layer, B, S, dtype):
        del layer, S
        c = config
        heads = (B, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        inputs = jnp.zeros((B, _channels(c), c.conv_width - 1), dtype)
        return DeltaState(inputs, jnp.zeros(heads, jnp.float32))


def _key_width(config) -> int:
    return config.linear_num_key_heads * config.linear_key_head_dim


def _channels(config) -> int:
    return 2 * _key_width(config) + config.linear_num_value_heads * config.linear_value_head_dim


def _log_uniform(key, shape, dtype):
    """log A with A ~ U(0.01, 16)."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0)).astype(dtype)


def _unit(x):
    """x / sqrt(Σ x² + 1e-6) over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
