"""Mixtures of experts: each token's own experts, none dropped; the load-balancing loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.models import TransformerConfig
from relax.models.moe import Experts, activation, total_aux_loss

M, D, F, E, C = 9, 6, 5, 4, 2


def module(**changes):
    config = TransformerConfig(
        **{
            "vocab_size": 7,
            "hidden_size": D,
            "intermediate_size": 3,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "num_experts": E,
            "num_experts_per_tok": C,
            "moe_intermediate_size": F,
            "initializer_range": 0.7,
        }
        | changes
    )
    return Experts(config, jnp.float32, jnp.float32)


def run(params, x, real, **changes):
    """`(y, sums)`, compiled."""
    return jax.jit(module(**changes).apply)({"params": params}, x, real)


@pytest.fixture(scope="module")
def setting():
    """`(params, x, real)`."""
    x = np.random.default_rng(1).normal(size=(M, D)).astype(np.float32)
    real = np.arange(M) < 7
    params = jax.jit(module().init)(jax.random.key(0), x, real)["params"]
    return params, x, real


def by_loops(params, x, normalise, chosen=C):
    """Every token's experts one by one, in float64."""
    router, gate, up, down = (
        np.asarray(params[name], np.float64)
        for name in ("router", "gate_proj", "up_proj", "down_proj")
    )
    out, choices, probabilities = [], [], []
    for token in x.astype(np.float64):
        scores = token @ router
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        best = sorted(range(len(probs)), key=lambda e: -probs[e])[:chosen]
        total = sum(probs[e] for e in best) if normalise else 1.0
        y = np.zeros(D)
        for e in best:
            inner = token @ gate[e]
            inner = inner / (1 + np.exp(-inner)) * (token @ up[e])
            y += probs[e] / total * (inner @ down[e])
        out.append(y)
        choices.append(best)
        probabilities.append(probs)
    return np.array(out), np.array(choices), np.array(probabilities)


@pytest.mark.parametrize(("normalise", "chosen"), [(True, 1), (False, 2), (True, 2), (True, 4)])
def test_output_is_the_weighted_sum_of_the_chosen_experts(setting, normalise, chosen):
    params, x, real = setting
    y, _ = run(params, x, real, norm_topk_prob=normalise, num_experts_per_tok=chosen)
    expected, _, _ = by_loops(params, x, normalise, chosen)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_no_token_is_dropped_when_all_choose_the_same_experts(setting):
    params, x, real = setting
    router = jnp.zeros((D, E)).at[:, 2].set(50.0).at[:, 0].set(25.0)
    crowded = dict(params) | {"router": router}
    x = np.abs(x)
    y, (times, _, _) = run(crowded, x, real)
    np.testing.assert_array_equal(times, [7, 0, 7, 0])
    np.testing.assert_allclose(y, by_loops(crowded, x, True)[0], atol=1e-5)


def test_a_token_does_not_depend_on_the_others(setting):
    params, x, real = setting
    together, _ = run(params, x, real)
    for m in (0, 4, 8):
        alone, _ = run(params, x[m : m + 1], real[m : m + 1])
        np.testing.assert_allclose(alone[0], together[m], atol=1e-6)


def test_the_routers_sums_count_real_tokens_only(setting):
    params, x, real = setting
    _, choices, probabilities = by_loops(params, x, True)
    _, (times, mass, tokens) = run(params, x, real)
    assert tokens == 7
    np.testing.assert_array_equal(times, np.bincount(choices[:7].ravel(), minlength=E))
    np.testing.assert_allclose(mass, probabilities[:7].sum(axis=0), atol=1e-5)
    noise = np.where(real[:, None], x, 1e3).astype(np.float32)
    again = run(params, noise, real)[1]
    jax.tree.map(np.testing.assert_array_equal, again, (times, mass, tokens))


@pytest.mark.parametrize(
    ("times", "mass", "tokens", "expected"),
    [
        ([4, 4, 4, 4], [2, 2, 2, 2], 8, 2.0),  # even: as many as each token chooses
        ([8, 8, 0, 0], [4, 4, 0, 0], 8, 4.0),  # 4 · (1 · ½ + 1 · ½)
        ([8, 4, 4, 0], [5, 2, 1, 0], 8, 3.25),  # 4 · (5/8 + ½ · 2/8 + ½ · 1/8)
        ([0, 0, 0, 0], [0, 0, 0, 0], 0, 0.0),  # padding only
    ],
)
def test_load_balancing_loss(times, mass, tokens, expected):
    sums = (jnp.float32(times), jnp.float32(mass), jnp.float32(tokens))
    np.testing.assert_allclose(total_aux_loss([sums]), expected, rtol=1e-6)


def test_load_balancing_loss_is_over_all_layers_together():
    first = (jnp.float32([4, 0]), jnp.float32([3, 1]), jnp.float32(4))
    second = (jnp.float32([0, 4]), jnp.float32([1, 3]), jnp.float32(4))
    assert total_aux_loss([first, None, second]) == 1.0  # even in sum, and uneven in each
    assert total_aux_loss([first]) == 1.5
    assert total_aux_loss([None, None]) is None


def test_gradients_are_finite_and_nothing_for_an_expert_that_no_token_chose(setting):
    params, x, real = setting
    router = jnp.zeros((D, E)).at[:, 2].set(9.0).at[:, 0].set(3.0)
    crowded = dict(params) | {"router": router}

    @jax.jit
    @jax.grad
    def gradients(params):
        y, sums = module().apply({"params": params}, jnp.abs(x), real)
        return jnp.square(y).sum() + total_aux_loss([sums])

    found = gradients(crowded)
    for name, leaf in found.items():
        assert np.isfinite(leaf).all(), name
    for name in ("gate_proj", "up_proj", "down_proj"):
        used = [bool(np.asarray(expert).any()) for expert in found[name]]
        assert used == [True, False, True, False], name
    assert np.asarray(found["router"]).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", [-0.2689414214, 1.7615941560]),
        ("gelu", [-0.1586552539, 1.9544997361]),  # x Φ(x)
        ("gelu_pytorch_tanh", [-0.1588080094, 1.9545976400]),
    ],
)
def test_gates(name, expected):
    np.testing.assert_allclose(activation(name)(jnp.float32([-1, 2])), expected, rtol=1e-5)


def test_an_unknown_gate_is_an_error():
    with pytest.raises(ValueError, match="unknown hidden_act 'relu'. Known: silu, gelu"):
        activation("relu")
