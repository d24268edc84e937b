"""`relax.losses` as a library: what it exports, shapes, names, and numbers that overflow."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relax.losses as losses
from relax.losses import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_TYPES,
    PREFERENCE_LOSSES,
    Clip,
    dpo_loss,
    group_advantages,
    policy_loss,
    register_kl_estimator,
    register_loss,
)

# Sizes that differ, so that no two axes can be taken for one another.
B, T, P, G, N, M, D, V = 3, 5, 2, 4, 6, 7, 8, 9


def f(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def b(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


# Function -> its arguments, and the shapes of its results.
SHAPES = {
    "batch_advantages": ((f(P, G),), [(P, G)]),
    "bradley_terry_loss": ((f(N), f(N), f(N)), [(N,)]),
    "centering_loss": ((f(N), f(N)), [(N,)]),
    "centred_advantages": ((f(P, G),), [(P, G)]),
    "clip_fractions": ((f(B, T), f(B), b(B, T), Clip()), [(B, T), (B, T)]),
    "dpo_loss": ((f(N), f(N), f(N), f(N)), [(N,)]),
    "gae": ((f(B, T), f(B, T), b(B, T)), [(B, T), (B, T)]),
    "gdpo_advantages": ((f(P, G, N), f(N)), [(P, G)]),
    "gpg_advantages": ((f(P, G),), [(P, G)]),
    "group_advantages": ((f(P, G),), [(P, G)]),
    "high_entropy": ((f(B, T), b(B, T), {"fraction": 0.5}), [(B, T)]),
    "kl_estimate": ((f(B, T), f(B, T), b(B, T)), [(B, T)]),
    "kto_loss": ((f(N), f(), b(N)), [(N,)]),
    "kto_reference_point": ((f(N), b(N)), [()]),
    "ld_weights": ((i(N, 2), 5, 0.5), [(N, 2, 5)]),
    "linear_collision": ((f(M, D), f(V, D), i(M)), [(M,)]),
    "linear_cross_entropy": ((f(M, D), f(V, D), i(M)), [()] * 5),
    "linear_logprobs": ((f(M, D), f(V, D), i(M)), [(M,), (M,)]),
    "log_ratios": ((f(B, T), f(B, T), b(B, T)), [(B, T)]),
    "masked_mean": ((f(B, T), b(B, T)), [()]),
    "masked_sum": ((f(B, T), b(B, T)), [()]),
    "masked_whiten": ((f(B, T), b(B, T)), [(B, T)]),
    "maxrl_advantages": ((f(P, G),), [(P, G)]),
    "nan_std": ((f(P, G),), [()]),
    "near_policy": ((f(B, T), f(B, T), f(B), b(B, T), {"threshold": 0.5}), [(B, 1)]),
    "next_token_targets": ((i(B, T),), [(B, T)]),
    "policy_loss": ((f(B, T), f(B, T), f(B), b(B, T)), [(), (), (B, T)]),
    "reinforce_plus_plus_advantages": ((f(P, G),), [(P, G)]),
    "reinforce_plus_plus_baseline_advantages": ((f(P, G),), [(P, G)]),
    "rloo_advantages": ((f(P, G),), [(P, G)]),
    "sampler_weights": ((f(B, T), f(B, T), b(B, T)), [(B, T)]),
    "target_hits": ((f(M, D), f(V, D), i(M)), [(M,)]),
    "token_logits": ((f(M, D), f(V, D)), [(M, V)]),
    "value_losses": ((f(B, T), f(B, T), f(B, T), b(B, T)), [(B, T), (B, T)]),
    "wpo_weights": ((f(N, 2, T), f(N, 2, T), b(N, 2, T)), [(N,)]),
}


def shapes_of(name, arguments):
    is_array = [isinstance(a, jax.ShapeDtypeStruct) for a in arguments]
    others = [a for a, array in zip(arguments, is_array, strict=True) if not array]
    options = others.pop() if others and isinstance(others[-1], dict) else {}

    def call(*arrays):
        return getattr(losses, name)(*arrays, *others, **options)

    out = jax.eval_shape(call, *(a for a, array in zip(arguments, is_array, strict=True) if array))
    return [leaf.shape for leaf in jax.tree.leaves(out)]


def test_every_exported_function_has_a_row_in_the_table_of_shapes():
    functions = {
        name
        for name in losses.__all__
        if inspect.isfunction(getattr(losses, name)) and not name.startswith("register_")
    }
    # Of numpy arrays alone, and of teachers.
    assert functions - {"pass_at_k_advantages", "linear_divergence", "top_logprobs"} == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_results_have_the_documented_shapes(name):
    arguments, expected = SHAPES[name]
    assert shapes_of(name, arguments) == expected


ANY_SHAPE = {"nan_std", "next_token_targets"}


@pytest.mark.parametrize("name", SHAPES)
def test_an_array_of_another_shape_is_refused(name):
    """One more entry along the last axis, or one more axis, of each array in its turn."""
    arguments, _ = SHAPES[name]
    lone = sum(isinstance(a, jax.ShapeDtypeStruct) for a in arguments) == 1
    for position, array in enumerate(arguments):
        if not isinstance(array, jax.ShapeDtypeStruct) or name in ANY_SHAPE or not array.shape:
            continue
        longer = (*array.shape[:-1], array.shape[-1] + 1)
        for shape in [(*array.shape, 1)] if lone else [longer, (*array.shape, 1)]:
            wrong = list(arguments)
            wrong[position] = jax.ShapeDtypeStruct(shape, array.dtype)
            with pytest.raises((ValueError, TypeError)):
                shapes_of(name, wrong)


def test_every_exported_function_tells_shapes_a_result_and_an_example():
    for name in SHAPES:
        doc = inspect.getdoc(getattr(losses, name))
        assert ">>> " in doc, name
        assert "`[" in doc or "any shape" in doc or "as for" in doc, name


# The same from a notebook: arrays of numpy in, a number out.


def test_a_loss_is_called_on_plain_arrays():
    """By hand: three tokens of advantage 1 and one of -2, ratio 1: -(3 - 2) / 4."""
    logprobs = np.log(np.float32([[0.5, 0.25, 0.1], [0.5, np.nan, np.nan]]))
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    loss, weight, ratio = policy_loss(logprobs, logprobs, np.float32([1, -2]), mask)
    assert loss == -0.25 and weight == 4 and (ratio == 1).all()


def test_dpo_is_log_2_where_policy_and_reference_agree():
    arrays = np.float32([[-10, -3], [-12, -5]])
    np.testing.assert_allclose(dpo_loss(*arrays, *arrays), np.log(2), rtol=1e-6)


def test_a_loss_says_which_arguments_it_reads():
    chosen = rejected = jnp.zeros(2)
    with pytest.raises(ValueError, match="'ipo' reads ref_chosen, ref_rejected, chosen_length"):
        dpo_loss(chosen, rejected, loss_type="ipo")
    with pytest.raises(ValueError, match="unknown loss_type 'dpo'. Known: sigmoid"):
        dpo_loss(chosen, rejected, loss_type="dpo")


def test_all_choices_are_registered_in_one_way():
    @register_loss("gap", "dpo", needs_reference=False)
    def gap(pairs, options):
        return pairs.rejected - pairs.chosen

    @register_kl_estimator("absolute")
    def absolute(delta):
        return jnp.abs(delta)

    try:
        assert dpo_loss(jnp.ones(1), jnp.zeros(1), loss_type="gap").tolist() == [-1]
        one = jnp.ones((1, 1))
        assert losses.kl_estimate(-one, one, one > 0, "absolute").tolist() == [[2]]
    finally:
        del PREFERENCE_LOSSES["gap"], KL_ESTIMATORS["absolute"]
    for registry in (ADVANTAGES, LOSS_TYPES, PREFERENCE_LOSSES, KL_ESTIMATORS):
        with pytest.raises(ValueError, match="unknown .* 'nothing'. Known: "):
            registry["nothing"]


# Overflow and rounding.


@pytest.mark.parametrize("group", [[99.9] * 8, [512.3] * 10, [9876.1] * 8, [-1e17] * 7, [0.1] * 3])
@pytest.mark.parametrize("name", [name for name in ADVANTAGES if "plus_plus" not in name])
@pytest.mark.parametrize("make", [np.float64, jnp.asarray])
def test_equal_rewards_give_an_advantage_of_exactly_0(name, group, make):
    assert (np.asarray(ADVANTAGES[name](make([group]))) == 0).all()


def test_rewards_that_differ_in_the_eighth_digit_are_told_apart():
    """By hand: offsets .25, .5, .75, 1 have mean .625 and deviation .3227."""
    found = group_advantages(1e7 + np.array([[0.25, 0.5, 0.75, 1.0]]))
    np.testing.assert_allclose(found, [[-1.1615, -0.3872, 0.3872, 1.1615]], atol=1e-4)


def test_equal_values_whiten_to_exactly_0():
    white = losses.masked_whiten(jnp.full((1, 8), 99.9), jnp.ones((1, 8), bool))
    assert (np.asarray(white) == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("gap", [89.0, 1e4])
def test_a_ratio_that_overflows_has_no_gradient_where_it_is_clipped(level, gap):
    """Log-ratios beyond 88, A > 0: the objective is 1.2 A, whatever the ratio."""
    old, mask = jnp.full((1, 2), -gap), jnp.ones((1, 2), bool)

    def loss(logprobs):
        return policy_loss(
            logprobs, old, jnp.ones(1), mask, importance_sampling_level=level
        ).loss  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 2)))
    np.testing.assert_allclose(value, -1.2, rtol=1e-6)
    assert (np.asarray(gradient) == 0).all()


def test_the_penalty_times_the_ratio_is_the_kl_of_the_trained_policy():
    """E_old[ρ k1] over all tokens of a vocabulary of two is Σ π log(π / π_ref), by hand."""
    policy, old, ref = np.float32([0.8, 0.2]), np.float32([0.5, 0.5]), np.float32([0.4, 0.6])
    mask = np.ones((1, 2), bool)  # each token once, as the old policy draws them
    logs = [np.log(x)[None] for x in (policy, old, ref)]
    kl = losses.kl_estimate(logs[0], logs[2], mask, "k1")
    loss = policy_loss(*logs[:2], np.zeros(1, np.float32), mask, kl=kl, unbiased_kl=True).loss
    expected = (policy * np.log(policy / ref)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    plain = policy_loss(*logs[:2], np.zeros(1, np.float32), mask, kl=kl).loss
    assert abs(float(plain) - expected) > 0.1
