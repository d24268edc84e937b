"""Layers with parameters: RMS norms and linear layers with adapters.

Axes: M tokens, D inputs, F outputs, r rank of an adapter.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import LoRA


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * scale over the last axis, in float32; or * (1 + scale).

    `multiplier` is one more factor, the same for all entries, and without `has_scale` the only one.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, eq. 4.
    """

    eps: float
    plus_one: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    multiplier: float = 1.0
    has_scale: bool = True

    @nn.compact
    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if not self.has_scale:
            return (x32 * self.multiplier).astype(self.dtype)
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        scale = scale.astype(jnp.float32) + (1.0 if self.plus_one else 0.0)
        scale = scale * self.multiplier
        return (x32 * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class Linear(nn.Module):
    """y = x W + b, and + dropout(x) A B · alpha / r where the parameters hold an adapter.

    `init` never makes an adapter: `lora_a` [D, r] and `lora_b` [r, F] are put beside the kernel by
    `relax.models.lora`.
    """

    features: int
    use_bias: bool
    stddev: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x):  # [M, D]
        init = nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        y = matmul(x, parallel.gather_for_use(kernel.astype(self.dtype), *self.path, "kernel"))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            # In float32, and so is its gradient: a sum over all tokens.
            y = (y + bias.astype(jnp.float32)[None, :]).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapter(x)
        return y

    def _adapter(self, x):
        if self.lora is None:
            raise ValueError(
                "the parameters hold adapters, whose scale the model must know: pass "
                "Transformer(..., lora=LoRA(...)), as relax.models.lora gives it."
            )
        if self.lora.dropout and self.has_rng("dropout"):
            kept = 1.0 - self.lora.dropout
            mask = jax.random.bernoulli(self.make_rng("dropout"), kept, x.shape)
            x = jnp.where(mask, x / kept, 0).astype(x.dtype)
        a: jax.Array = self.get_variable("params", "lora_a")
        b: jax.Array = self.get_variable("params", "lora_b")
        y = matmul(matmul(x, a.astype(self.dtype)), b.astype(self.dtype))
        return y * (self.lora.alpha / self.lora.r)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[M, D]` times w `[D, F]`, both of one dtype, which is also the result's.

    A bfloat16 product for a CPU is written as a float32 one of the same inputs, then rounded: XLA
    would widen the weights first, and take two to three times as long.
    """
    if w.dtype != jnp.bfloat16:
        return x @ w
    return jax.lax.platform_dependent(x, w, cpu=_matmul_rounded, default=jnp.matmul)


@jax.custom_vjp
def _matmul_rounded(x, w):
    if x.shape[0] == 1:  # a product of one row widens the weights all the same
        return _dot(jnp.repeat(x, 2, axis=0), w, 1, 0)[:1]
    return _dot(x, w, 1, 0)


def _matmul_rounded_bwd(inputs, d_y):
    x, w = inputs
    return _dot(d_y, w, 1, 1), _dot(x, d_y, 0, 0)


_matmul_rounded.defvjp(lambda x, w: (_matmul_rounded(x, w), (x, w)), _matmul_rounded_bwd)


def _dot(a, b, axis_a, axis_b):
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    y = jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
    return y.astype(a.dtype)
