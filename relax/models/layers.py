"""Layers with parameters: RMS norms and linear layers with adapters.

Axes: M tokens, D inputs, F outputs, r rank of an adapter.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import LayerSpec, LoRA, TransformerConfig
from relax.models.quantization import Quantized, dequantize, plain

SCALE_UNKNOWN = (
    "the parameters hold adapters, whose scale the model must know: pass Transformer(..., "
    "lora=LoRA(...)), as relax.models.lora gives it."
)


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
    """y = x W + b, and + dropout(x) A B · s where the parameters hold an adapter.

    With `lora_magnitude` m (DoRA) the columns of W + s A B get the norms m: y = x V + b with
    V = m (W + s A B) / ‖W + s A B‖. The norm is a constant for the gradient, as in the paper.

    `init` never makes an adapter: `lora_a` [D, r], `lora_b` [r, F] and `lora_magnitude` [F] are put
    beside the kernel by `relax.models.lora`.
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
        kernel = weight(self, "kernel", init, (x.shape[-1], self.features), self.param_dtype)
        if isinstance(kernel, Quantized):
            used = gathered(kernel, *self.path, "kernel")
        else:
            used = parallel.gather_for_use(kernel.astype(self.dtype), *self.path, "kernel")
        y = product = matmul(x, used)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            # In float32, and so is its gradient: a sum over all tokens.
            y = (y + bias.astype(jnp.float32)[None, :]).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapter(x, kernel, used, product)
        return y

    def _adapter(self, x, kernel, used, product):
        """What the adapter adds to `product`, x W; `used` is W in the dtype of x."""
        if self.lora is None:
            raise ValueError(SCALE_UNKNOWN)
        if self.lora.dropout and self.has_rng("dropout"):
            kept = 1.0 - self.lora.dropout
            mask = jax.random.bernoulli(self.make_rng("dropout"), kept, x.shape)
            x = jnp.where(mask, x / kept, 0).astype(x.dtype)
            if self.lora.use_dora:
                product = matmul(x, used)
        a: jax.Array = self.get_variable("params", "lora_a")
        b: jax.Array = self.get_variable("params", "lora_b")
        scale = adapter_scale(self, "lora_scale", self.lora)
        y = matmul(matmul(x, a.astype(self.dtype)), b.astype(self.dtype)) * scale
        if not self.lora.use_dora:
            return y
        magnitude: jax.Array = self.get_variable("params", "lora_magnitude")
        norm = jax.lax.stop_gradient(column_norms(kernel, a, b, scale))
        ratio = (magnitude / norm)[None, :]
        return ((ratio - 1.0) * product + ratio * y).astype(self.dtype)


def column_norms(kernel, a, b, scale: float | jax.Array) -> jax.Array:
    """‖W + s A B‖ of every column, `[F]` float32, without the sum of the two:

        ‖W‖² + 2 s Σ (Aᵀ W) ∘ B + s² Σ (Aᵀ A B) ∘ B

    Args:
      kernel, a, b: `[D, F]`, `[D, r]`, `[r, F]`.
    """
    kernel, a, b = (plain(x).astype(jnp.float32) for x in (kernel, a, b))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    cross, square = product(a.T, kernel), product(product(a.T, a), b)
    squares = jnp.square(kernel).sum(axis=0) + (scale * b * (2 * cross + scale * square)).sum(
        axis=0
    )
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


class XIELU(nn.Module):
    """a x² + b x for x > 0, else c (exp(min(x, e)) - 1 - x) + b x, in float32.

    a = softplus(alpha_p), c = b + softplus(alpha_n). The numbers b and e, `beta` and `eps`, are not
    trained, as they are not in transformers.
    Huang and Schlag, Deriving Activation Functions Using Integration, 2024, section 4.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def number(name, value, shape=()):
            init = nn.initializers.constant(value)
            return self.param(name, init, shape, self.param_dtype).astype(jnp.float32)

        a, c = number("alpha_p", 0.2032, (1,)), number("alpha_n", -1.0502, (1,))  # of 0.8 and 0.3
        b, e = (jax.lax.stop_gradient(number(*one)) for one in (("beta", 0.5), ("eps", -1e-6)))
        a, c, x32 = jax.nn.softplus(a), b + jax.nn.softplus(c), x.astype(jnp.float32)
        above = a[None, :] * jnp.square(x32)
        below = c[None, :] * (jnp.expm1(jnp.minimum(x32, e)) - x32)
        return (jnp.where(x32 > 0, above, below) + b * x32).astype(self.dtype)


def adapter_scale(module: Any, name: str, lora: LoRA) -> float | jax.Array:
    """The factor of an adapter's A B: a leaf of its own where a pattern of LoRA names it."""
    if not module.has_variable("params", name):
        return lora.scale
    own: jax.Array = module.get_variable("params", name)
    return jax.lax.stop_gradient(own).astype(module.dtype)


def weight(module: nn.Module, name: str, init, shape, dtype) -> jax.Array | Quantized:
    """A parameter of a module, which may be quantised."""
    if module.has_variable("params", name):
        found: jax.Array | Quantized = module.get_variable("params", name)
        if isinstance(found, Quantized):
            return found
    return module.param(name, init, shape, dtype)


def gathered(quantized: Quantized, *path: str) -> Quantized:
    """A quantised weight, its codes and scales gathered for use in a layer."""
    return dataclasses.replace(
        quantized,
        codes=parallel.gather_for_use(quantized.codes, *path, "codes"),
        scales=parallel.gather_for_use(quantized.scales, *path, "scales"),
    )


class LayerPart(nn.Module):
    """A part of a layer, whose sizes and switches are those of the model."""

    config: TransformerConfig
    layer: LayerSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoRA | None = None

    def norm(self, has_scale: bool = True) -> RMSNorm:
        """A norm with the settings of the model, without a scale where it has none."""
        c = self.config
        return RMSNorm(
            c.rms_norm_eps,
            c.norm_plus_one,
            self.dtype,
            self.param_dtype,
            has_scale=c.norm_scale and has_scale,
        )

    def linear(self, features: int, use_bias: bool) -> Linear:
        """A linear layer that may have an adapter."""
        return Linear(
            features,
            use_bias,
            self.config.initializer_range,
            self.dtype,
            self.param_dtype,
            self.lora,
        )


def matmul(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
    """x `[M, D]` times w `[D, F]`, both of one dtype, which is also the result's.

    A quantised w has no gradient. A bfloat16 product for a CPU is written as a float32 one of the
    same inputs, then rounded: XLA would widen the weights first, and take two to three times as
    long.
    """
    if isinstance(w, Quantized):
        return _matmul_quantized(x, w)
    if w.dtype != jnp.bfloat16:
        return x @ w
    return jax.lax.platform_dependent(x, w, cpu=_matmul_rounded, default=jnp.matmul)


@jax.custom_vjp
def _matmul_quantized(x, w):
    return matmul(x, dequantize(after(x, w), x.dtype))


def _matmul_quantized_bwd(w, d_y):
    return matmul(d_y, dequantize(after(d_y, w), d_y.dtype).T), None


_matmul_quantized.defvjp(lambda x, w: (_matmul_quantized(x, w), w), _matmul_quantized_bwd)


def after(x: jax.Array, w: Quantized) -> Quantized:
    """A quantised weight that becomes a matrix when x is there, and not before.

    Otherwise the compiler may make all matrices of a model at once, or keep that of the forward
    pass for the backward pass. On CPUs it drops barriers, but not a summand that depends on x: no
    number is above infinity, which it cannot know.
    """
    if parallel.platform() != "cpu":
        return jax.lax.optimization_barrier((w, x))[0]
    first = x.reshape(-1)[0].astype(jnp.float32)
    return dataclasses.replace(w, codes=w.codes + (first > jnp.inf).astype(w.codes.dtype))


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
