"""Mixture of experts: every token goes to the experts of highest router probability.

Axes: M tokens, D model, F feed-forward, E experts, C experts chosen per token.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.config import TransformerConfig

RouterSums = tuple[jax.Array, jax.Array, jax.Array]


class Experts(nn.Module):
    """y = Σ_c p_c · expert_c(x) over the C experts of the largest router probability.

    No token is dropped, however many choose the same expert: tokens are sorted by expert, and the
    products run over groups of unequal size. Fedus et al., Switch Transformers, 2021; Jiang et al.,
    Mixtral of Experts, 2024, section 2.1.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, real):
        """x: `[M, D]`; real: `[M]` bool, the tokens that the router's sums count."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        E, D, F = c.num_experts, c.hidden_size, c.moe_intermediate_size
        router = self.param("router", init, (D, E), self.param_dtype)
        gate = self.param("gate_proj", init, (E, D, F), self.param_dtype).astype(self.dtype)
        up = self.param("up_proj", init, (E, D, F), self.param_dtype).astype(self.dtype)
        down = self.param("down_proj", init, (E, F, D), self.param_dtype).astype(self.dtype)

        probs = jax.nn.softmax((x @ router.astype(self.dtype)).astype(jnp.float32))  # [M, E]
        weights, chosen = jax.lax.top_k(probs, c.num_experts_per_tok)  # [M, C]
        if c.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Each device sorts its own tokens, and has some of the columns of every expert.
        run = parallel.per_device(
            functools.partial(_mixed, act=activation(c.hidden_act)),
            (("batch",), ("batch",), ("batch",), *_COLUMNS),
            ("columns", "batch", None),
        )
        y = run(x, weights.astype(self.dtype), chosen, gate, up, down).sum(axis=0)

        times = jnp.where(real[:, None, None], jax.nn.one_hot(chosen, E), 0).sum(axis=(0, 1))
        mass = jnp.where(real[:, None], probs, 0).sum(axis=0)
        return y, (times, mass, real.sum().astype(jnp.float32))


_COLUMNS = ((None, None, "columns"), (None, None, "columns"), (None, "columns", None))


def _mixed(x, weights, chosen, gate, up, down, *, act):
    """`[1, M, D]`: Σ_c weights_c · expert_c(x), over the experts' columns that are here."""
    E, C = gate.shape[0], chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of the M * C choices, by expert
    sizes = jnp.bincount(chosen.reshape(-1), length=E).astype(jnp.int32)
    rows = x[order // C]
    hidden = act(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    outputs = jax.lax.ragged_dot(hidden, down, sizes)  # [M * C, D]
    outputs = outputs[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return (outputs * weights[:, :, None]).sum(axis=1)[None]


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
