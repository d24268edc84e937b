"""bfloat16: what is computed in float32 all the same, and that training still gets on."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from relax.config import SFTConfig
from relax.engine.schedule import make_optimizer
from relax.models import Transformer, TransformerConfig
from relax.models.layers import Linear, RMSNorm
from relax.models.rope import Rope
from relax.models.rotary import rotary_angles, rotate
from relax.optimizers import OPTIMIZERS
from relax.optimizers.stochastic_rounding import stochastic_round, stochastic_rounding
from relax.trainers import SFTTrainer
from relax.trainers.update import apply_gradients

BF16 = jnp.dtype(jnp.bfloat16)
# Everything on: biases, norms of heads, caps, a mixture of experts, a window.
SHAPE = TransformerConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    attention_bias=True,
    mlp_bias=True,
    output_bias=True,
    qk_norm="head",
    post_norm=True,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=9.0,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    dense_layers=(0,),
    initializer_range=0.2,
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": IDS, "positions": np.tile(np.arange(16), (2, 1))}
BATCH = {name: np.int32(x) for name, x in BATCH.items()} | {"segment_ids": np.ones_like(IDS)}


def equations(jaxpr):
    """Of a program, those within loops, conditions and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_norms_softmax_rotation_losses_and_sums_over_tokens_are_float32(param_dtype):
    """Every such operation in the program of an update, forward and backward."""
    model = Transformer(SHAPE, BF16, jnp.dtype(param_dtype))
    trainer = SFTTrainer(model, OPTIMIZERS["adamw"](1e-3), max_grad_norm=1.0)
    state = jax.eval_shape(trainer.create_train_state, jax.random.key(0))
    program = jax.make_jaxpr(trainer.update)(state, BATCH).jaxpr
    exact = {"exp", "log", "rsqrt", "sqrt", "sin", "cos", "tanh", "div", "reduce_max", "cumsum"}
    seen = set()
    for equation in equations(program):
        name, (out, *_) = equation.primitive.name, equation.outvars
        reduces = name == "reduce_sum" and equation.invars[0].aval.shape[0] >= IDS.size
        reduces &= out.aval.shape[:1] != (IDS.size,)  # the sum over a token's experts is one of two
        if name in exact or reduces:
            seen.add(name)
            assert out.aval.dtype != BF16, equation
    assert {"exp", "log", "rsqrt", "sin", "cos", "tanh", "reduce_sum"} <= seen


def test_logits_in_bfloat16_are_near_those_in_float32():
    """Without experts: a token whose two best are close goes to the other one, and far away."""
    shape = dataclasses.replace(SHAPE, num_experts=0)
    params = jax.jit(Transformer(shape).init)(jax.random.key(0), IDS[:1, :8])["params"]

    def logits(**options):
        return jax.jit(Transformer(shape, **options).apply)({"params": params}, IDS)

    exact, ours = logits(), logits(dtype=BF16)
    assert ours.dtype == jnp.float32
    error = np.abs(np.asarray(ours - exact))
    assert error.max() < 0.1 * np.abs(exact).max() and error.mean() < 0.01 * np.abs(exact).max()


def test_the_head_is_float32_where_it_is_asked_for(tiny_model, tiny_params):
    """Its hidden states are those of bfloat16 before they are rounded, sampler included."""
    plain = tiny_model.clone(dtype=jnp.bfloat16)
    cast = plain.clone(cast_lm_head_to_fp32=True)
    ids = IDS % tiny_model.config.vocab_size

    def states(model):
        apply = jax.jit(lambda p: model.apply({"params": p}, ids, method="hidden_states"))
        return apply(tiny_params)

    rounded, exact = states(plain), states(cast)
    assert (rounded.dtype, exact.dtype) == (BF16, jnp.float32)
    np.testing.assert_array_equal(exact.astype(BF16), rounded)
    assert (np.asarray(exact) != np.asarray(rounded, np.float32)).mean() > 0.9
    lengths = np.full(len(ids), ids.shape[1])
    prefill = jax.eval_shape(
        lambda p: cast.apply({"params": p}, ids, lengths, method="prefill"), tiny_params
    )
    assert prefill[0].dtype == jnp.float32 and prefill[1][0][0].dtype == BF16


def test_a_norm_over_many_entries_is_exact_in_bfloat16():
    """4,096 ones: their squares would stop adding up at 256, and give 4 in place of 1."""
    norm = RMSNorm(1e-6, False, BF16, BF16)
    x = jnp.ones((1, 4096), BF16)
    y = norm.apply({"params": {"scale": jnp.ones(4096, BF16)}}, x)
    assert y.dtype == BF16 and set(np.unique(np.float32(y))) == {1.0}


def test_positions_past_256_turn_by_their_own_angle_in_bfloat16():
    """A position in bfloat16 would be one of every 16 at 4,000."""
    positions = np.arange(4000, 4003)[None, :]
    angles = rotary_angles(jnp.asarray(positions), Rope(10000.0), 2)
    x = jnp.tile(jnp.asarray([1.0, 0.0], BF16), (3, 1, 1, 1))
    expected = np.stack([np.cos(positions[0]), np.sin(positions[0])], axis=-1)
    assert np.float32(rotate(x, angles))[:, 0, 0] == pytest.approx(expected, abs=2**-8)


def test_the_gradient_of_a_bias_adds_up_over_all_tokens_in_bfloat16():
    layer = Linear(1, True, 0.02, BF16, jnp.dtype(jnp.float32))
    params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
    x = jnp.zeros((4096, 1), BF16)

    def total(params):
        return layer.apply({"params": params}, x).astype(jnp.float32).sum()

    assert float(jax.jit(jax.grad(total))(params)["bias"][0]) == 4096


# Parameters in bfloat16


def test_rounding_at_random_is_right_in_the_mean_and_gives_neighbours_only():
    x = jnp.full(100_000, 1 + 0.3 * 2**-7, jnp.float32)  # three tenths of the last bit above 1
    y = np.asarray(stochastic_round(x, jax.random.key(0)))
    assert set(np.unique(y)) == {1.0, 1 + 2**-7}
    assert (y > 1).mean() == pytest.approx(0.3, abs=0.01)  # seven standard deviations
    again = np.asarray(stochastic_round(x, jax.random.key(1)))
    both = ((y > 1) & (again > 1)).mean()
    assert both == pytest.approx(0.09, abs=0.01)  # keys are independent


def test_rounding_keeps_what_bfloat16_holds_and_what_is_no_number():
    x = jnp.asarray([0.0, -1.5, 2.0**-100, np.inf, -np.inf, np.nan], jnp.float32)
    y = stochastic_round(x, jax.random.key(0))
    assert np.array_equal(y, x, equal_nan=True)


def run(optimizer, updates, param=1.0, gradient=1.0, size=20_000):
    params = {"w": jnp.full((size, 1), param, BF16), "norm": jnp.full(size, param, jnp.float32)}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        true, one = jnp.bool_(True), jnp.float32(1.0)
        return apply_gradients(optimizer, gradients, params, state, true, one)

    for _ in range(updates):
        params, state = step(params, state)
    assert params["w"].dtype == BF16 and params["norm"].dtype == jnp.float32
    return {name: np.float32(leaf) for name, leaf in params.items()}, state


def test_updates_below_the_last_bit_add_up_instead_of_being_lost():
    """40 updates of a tenth of bfloat16's last bit below 1: together four bits."""
    sgd = OPTIMIZERS["sgd"](0.1 * 2**-8)
    lost, _ = run(sgd, 40)
    assert (lost["w"] == 1).all()
    kept, _ = run(stochastic_rounding(sgd), 40)
    assert kept["w"].mean() == pytest.approx(1 - 4 * 2**-8, abs=0.1 * 2**-8)
    assert (kept["norm"] == lost["norm"]).all()  # float32 is left alone
    again, _ = run(stochastic_rounding(sgd), 40)
    assert (again["w"] == kept["w"]).all()


def test_a_run_with_bfloat16_parameters_keeps_float32_moments_and_rounds_at_random():
    config = SFTConfig().replace(param_dtype="bfloat16", learning_rate=1e-4, warmup_steps=0)
    optimizer = make_optimizer(config, 100)
    params, state = run(optimizer, 10)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and all(leaf.dtype == jnp.float32 for leaf in moments)
    assert params["w"].mean() == pytest.approx(params["norm"].mean(), abs=1e-4)
    assert len(np.unique(params["w"])) > 1
    assert len(optax.tree.get_all_with_path(state, "learning_rate")) >= 1
