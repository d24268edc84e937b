"""Mixture of experts: every token goes to the experts of highest router probability.

Axes: M tokens, D model, F feed-forward, E experts, C experts chosen per token.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import LoRA, TransformerConfig
from relax.models.layers import SCALE_UNKNOWN, adapter_scale, after, weight
from relax.models.quantization import Quantized, dequantize

RouterSums = tuple[jax.Array, jax.Array, jax.Array]


class Experts(nn.Module):
    """y = Σ_c p_c · expert_c(x) over the C experts of the largest router probability p.

    No token is dropped, however many choose the same expert: tokens are sorted by expert, and the
    products run over groups of unequal size. Fedus et al., Switch Transformers, 2021; Jiang et al.,
    Mixtral of Experts, 2024, section 2.1.

    Adapters among the parameters, see `relax.models.lora`, are added to the router and the experts.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x, real):
        """x: `[M, D]`; real: `[M]` bool, the tokens that the router's sums count."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        E, D, F = c.num_experts, c.hidden_size, c.moe_intermediate_size
        router = self.param("router", init, (D, E), self.param_dtype)
        shapes = {"gate_proj": (E, D, F), "up_proj": (E, D, F), "down_proj": (E, F, D)}
        experts = {n: weight(self, n, init, shape, self.param_dtype) for n, shape in shapes.items()}
        gate_bias, up_bias = self._bias("gate_proj", E, F), self._bias("up_proj", E, F)
        down_bias, router_bias = self._bias("down_proj", E, D), self._bias("router", E)

        logits = x @ router.astype(self.dtype)
        if router_bias is not None:
            logits = logits + router_bias[None, :]
        if (adapter := self._adapter("router")) is not None:
            logits = logits + x @ adapter[0] @ adapter[1]
        probs = jax.nn.softmax(logits.astype(jnp.float32))  # [M, E]
        weights, chosen = jax.lax.top_k(probs, c.num_experts_per_tok)  # [M, C]
        if c.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Each device sorts its own tokens, and has some of the columns of every expert.
        adapted = [
            (w if isinstance(w, Quantized) else w.astype(self.dtype), *(self._adapter(name) or ()))
            for name, w in experts.items()
        ]
        arrays, structure = jax.tree.flatten(adapted)
        # Without the whole of a quantised matrix a device could not tell where it ends.
        cut = not any(isinstance(w, Quantized) and w.padding for w in experts.values())
        column = "columns" if cut else None
        columns = [
            dims if cut else (None, None, None)
            for part, of in zip(adapted, _COLUMNS, strict=True)
            for array, dims in zip(part, of, strict=False)
            for _ in jax.tree.leaves(array)  # codes and scales are cut alike
        ]
        run = parallel.per_device(
            functools.partial(_mixed, structure=structure, gated=_gated(c)),
            (("batch",), ("batch",), ("batch",), *((None, column),) * 2, *columns),
            (column, "batch", None),
        )
        weights = weights.astype(self.dtype)
        y = run(x, weights, chosen, gate_bias, up_bias, *arrays).sum(axis=0)
        places = jax.nn.one_hot(chosen, E)  # [M, C, E]
        if down_bias is not None:
            y = y + jnp.einsum("MC,MCE->ME", weights, places.astype(self.dtype)) @ down_bias

        times = jnp.where(real[:, None, None], places, 0).sum(axis=(0, 1))
        mass = jnp.where(real[:, None], probs, 0).sum(axis=0)
        return y, (times, mass, real.sum().astype(jnp.float32))

    def _bias(self, name: str, *shape: int) -> jax.Array | None:
        """The bias of the router, or those of a weight of all experts; None: there is none."""
        if not self.config.expert_bias:
            return None
        bias = self.param(f"{name}_bias", nn.initializers.zeros, shape, self.param_dtype)
        return bias.astype(self.dtype)

    def _adapter(self, name: str) -> tuple[jax.Array, jax.Array] | None:
        """A and s B of a weight's adapter, if the parameters hold one."""
        if not self.has_variable("params", f"{name}_lora_a"):
            return None
        if self.lora is None:
            raise ValueError(SCALE_UNKNOWN)
        a: jax.Array = self.get_variable("params", f"{name}_lora_a")
        b: jax.Array = self.get_variable("params", f"{name}_lora_b")
        scale = adapter_scale(self, f"{name}_lora_scale", self.lora)
        return a.astype(self.dtype), (b * scale).astype(self.dtype)


# Of weights and of their adapters' A and B.
_BY_OUTPUT = ((None, None, "columns"), (None, None, None), (None, None, "columns"))
_BY_INPUT = ((None, "columns", None), (None, "columns", None), (None, None, None))
_COLUMNS = (_BY_OUTPUT, _BY_OUTPUT, _BY_INPUT)


def _mixed(x, weights, chosen, gate_bias, up_bias, *arrays, structure, gated):
    """`[1, M, D]`: Σ_c weights_c · expert_c(x), over the experts' columns that are here."""
    gate, up, down = jax.tree.unflatten(structure, arrays)
    E, C = gate[0].shape[0], chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of the M * C choices, by expert
    experts = chosen.reshape(-1)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=E).astype(jnp.int32)
    rows = x[order // C]
    gates, ups = _product(rows, gate, sizes), _product(rows, up, sizes)
    if gate_bias is not None:
        gates, ups = gates + gate_bias[experts], ups + up_bias[experts]
    outputs = _product(gated(gates, ups), down, sizes)  # [M * C, D]
    outputs = outputs[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return (outputs * weights[:, :, None]).sum(axis=1)[None]


def _product(rows, weight, sizes):
    """x W + x A s B of each row's expert; `weight` is (W,) or (W, A, s B)."""
    run = _ragged_quantized if isinstance(weight[0], Quantized) else jax.lax.ragged_dot
    y = run(rows, weight[0], sizes)
    if len(weight) == 1:
        return y
    return y + jax.lax.ragged_dot(jax.lax.ragged_dot(rows, weight[1], sizes), weight[2], sizes)


@jax.custom_vjp
def _ragged_quantized(rows, weight, sizes):
    return jax.lax.ragged_dot(rows, dequantize(after(rows, weight), rows.dtype), sizes)


def _ragged_quantized_bwd(kept, d_y):
    weight, sizes = kept
    whole = dequantize(after(d_y, weight), d_y.dtype).swapaxes(1, 2)
    return jax.lax.ragged_dot(d_y, whole, sizes), None, None


_ragged_quantized.defvjp(
    lambda rows, weight, sizes: (_ragged_quantized(rows, weight, sizes), (weight, sizes)),
    _ragged_quantized_bwd,
)


def _gated(c: TransformerConfig):
    """The function of the outputs of `gate_proj` and `up_proj`."""
    if c.swiglu_limit is None:
        act = activation(c.hidden_act)
        return lambda gate, up: act(gate) * up
    limit, alpha = c.swiglu_limit, c.swiglu_alpha

    def clamped(gate, up):
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * nn.sigmoid(alpha * gate)

    return clamped


def total_aux_loss(layers: list[RouterSums | None]) -> jax.Array | None:
    """The load-balancing loss of a model from its layers' sums; None where no layer has experts.

        E · Σ_e f_e P_e

    Smallest, and equal to C, where all experts get as many tokens. f_e is how often expert e was
    chosen per token, P_e its mean probability, both over the real tokens of all layers together.
    Fedus et al., Switch Transformers, 2021, eq. 4, in the form of transformers.
    """
    layers = [sums for sums in layers if sums is not None]
    if not layers:
        return None
    times, mass, tokens = jax.tree.map(lambda *sums: sum(sums), *layers)
    tokens = jnp.maximum(tokens, 1.0)
    return times.shape[0] * jnp.sum(times / tokens * (mass / tokens))


def activation(name: str):
    """The function of a gate by transformers' name."""
    if name == "silu":
        return nn.silu
    if name in ("gelu", "gelu_pytorch_tanh"):
        return lambda x: nn.gelu(x, approximate=name != "gelu")
    if name == "relu2":
        return lambda x: jnp.square(nn.relu(x))
    raise ValueError(f"unknown hidden_act {name!r}. Known: silu, gelu, gelu_pytorch_tanh, relu2.")
