"""Preference losses against numbers computed apart from them, by hand and by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.config import dpo as config
from relax.losses import (
    DIVERGENCES,
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    kto_loss,
    kto_reference_point,
    ld_weights,
    linear_collision,
    wpo_weights,
)


def pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length) -> Pairs:
    arrays = [chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length]
    arrays = [jnp.array(a, jnp.float32) for a in arrays]
    mean = jnp.full_like(arrays[0], arrays[4].mean())
    return Pairs(*arrays, mean)


# Δ = [1.5, -1]; every answer but for the lengths as in the table of golden numbers.
GOLDEN = pairs([-10, -12], [-11, -9], [-10.5, -11.5], [-10, -9.5], [4, 4], [5, 5])


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("sigmoid", {}, 0.682677),
        ("sigmoid", {"label_smoothing": 0.1}, 0.685177),
        ("robust", {"label_smoothing": 0.1}, 0.679552),
        ("hinge", {}, 0.975),
        ("ipo", {}, 24.578125),
        ("sigmoid_norm", {}, 0.690745),
        ("apo_zero", {}, 0.993759),
        ("nca_pair", {}, 1.380904),
        ("bco_pair", {}, 1.374888),
        ("sppo_hard", {}, 48.375),
        # By hand: 22 nats over 8 chosen tokens.
        ("sft", {}, 2.75),
    ],
)
def test_losses_equal_the_golden_numbers(name, options, expected):
    loss = PREFERENCE_LOSSES[name](GOLDEN, LossOptions(**options)).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def logistic(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_apo_down_exo_simpo_and_orpo_equal_their_equations_in_numpy():
    """One pair: s_c = 0.5, s_r = -1, Δ = 1.5, log π -10 over 4 tokens against -11 over 5."""
    first = jax.tree.map(lambda a: a[:1], GOLDEN)
    w = logistic(0.1 * 1.5)
    exo = w * np.log(w / 0.9) + (1 - w) * np.log((1 - w) / 0.1)
    p, q = np.exp(-10 / 4), np.exp(-11 / 5)
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = {
        "apo_down": logistic(0.05) + 1 - logistic(0.15),
        "exo_pair": exo,
        "simpo": -np.log(logistic(0.1 * (-10 / 4 + 11 / 5) - 0.5)),
        "orpo": -np.log(p) - 0.1 * np.log(logistic(np.log(ratio))),
    }
    options = LossOptions(label_smoothing=0.1)
    for name, value in expected.items():
        np.testing.assert_allclose(
            PREFERENCE_LOSSES[name](first, options), value, rtol=1e-5, err_msg=name
        )


def test_kto_equals_its_equation_in_numpy_and_the_reference_point_is_no_gradient():
    scores, other = np.float32([0.5, -1, 2, 9]), np.float32([0.4, 0.2, -0.3, 50])
    good, real = np.array([1, 0, 1, 1]) > 0, np.array([1, 1, 1, 0]) > 0
    kl = kto_reference_point(jnp.array(other), jnp.array(real))
    np.testing.assert_allclose(kl, 0.1, rtol=1e-6)
    z = 0.1
    expected = [
        2.0 * (1 - logistic(0.1 * (0.5 - z))),
        0.5 * (1 - logistic(0.1 * (z + 1))),
        2.0 * (1 - logistic(0.1 * (2 - z))),
        2.0 * (1 - logistic(0.1 * (9 - z))),
    ]
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    loss = kto_loss(jnp.array(scores), kl, jnp.array(good), **weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    slope = jax.grad(lambda kl: kto_loss(jnp.array(scores), kl, jnp.array(good)).sum())(kl)
    assert slope == 0


def test_the_reference_point_of_kto_is_never_negative():
    assert kto_reference_point(jnp.array([-3.0, 1.0]), jnp.array([True, True])) == 0


# discopop is not convex: it has a local maximum just above Δ = 0.
@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if name != "discopop"])
def test_a_step_down_the_gradient_widens_the_margin(name):
    """At the start, where policy and reference are one."""
    start = pairs([-10, -12], [-11, -9], [-10, -12], [-11, -9], [4, 4], [4, 4])

    def loss(chosen, rejected):
        p = start._replace(chosen=chosen, rejected=rejected)
        return PREFERENCE_LOSSES[name](p, LossOptions(label_smoothing=0.1)).mean()

    d_chosen, d_rejected = jax.grad(loss, (0, 1))(start.chosen, start.rejected)
    assert (np.asarray(d_chosen) < np.asarray(d_rejected)).all()


def test_losses_that_name_no_reference_do_not_read_it():
    changed = GOLDEN._replace(ref_chosen=jnp.zeros(2), ref_rejected=jnp.ones(2))
    for name, loss in PREFERENCE_LOSSES.items():
        options = LossOptions(label_smoothing=0.1)
        same = np.array_equal(loss(GOLDEN, options), loss.function(changed, options))
        assert same != loss.needs_reference, name


def test_losses_read_the_options_that_they_name_and_no_others():
    base = LossOptions(beta=0.1, label_smoothing=0.1, simpo_gamma=0.5)
    for name, loss in PREFERENCE_LOSSES.items():
        changes = {"label_smoothing": 0.2, "simpo_gamma": 0.2, "discopop_tau": 0.2}
        for option, value in changes.items():
            other = base._replace(**{option: value})
            same = np.array_equal(loss(GOLDEN, base), loss(GOLDEN, other))
            assert same == (option not in loss.reads), (name, option)
        other = base._replace(f_divergence_type="js_divergence")
        same = np.array_equal(loss(GOLDEN, base), loss(GOLDEN, other))
        assert same == (not loss.any_divergence), name


# The losses and divergences below are what TRL 1.16's `_compute_loss` returns for the pairs of
# GOLDEN and a third one, torch in float64.
THREE = pairs(
    [-10, -12, -7], [-11, -9, -8], [-10.5, -11.5, -9], [-10, -9.5, -8.5], [4, 4, 3], [5, 5, 2]
)
VARIANTS = [
    ("discopop", {}, 0.8286924),
    ("aot", {}, 0.6621036),
    ("aot", {"label_smoothing": 0.1}, 0.6687703),
    ("aot_unpaired", {}, 0.6608546),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, 0.6698675),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, 0.6821560),
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, 0.6692595),
    ("hinge", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5}, 0.8928982),
    ("ipo", {"f_divergence_type": "js_divergence"}, 24.5372534),
]


@pytest.mark.parametrize("name, options, expected", VARIANTS)
def test_variants_equal_trl(name, options, expected):
    loss = PREFERENCE_LOSSES[name](THREE, LossOptions(**options)).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_log_ratios_that_overflow_have_a_finite_loss_and_gradient(kind):
    far = pairs([-1e4, -3], [-3, -1e4], [-3, -1e4], [-1e4, -3], [4, 4], [5, 5])
    options = LossOptions(f_divergence_type=kind)

    def loss(chosen):
        return PREFERENCE_LOSSES["sigmoid"](far._replace(chosen=chosen), options).sum()

    value, gradient = jax.value_and_grad(loss)(far.chosen)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_sorted_losses_do_not_see_pairs_that_do_not_count():
    spoilt = jax.tree.map(lambda x: jnp.append(x, jnp.nan), THREE)
    spoilt = spoilt._replace(mask=jnp.array([True, True, True, False]))
    for name in config.COMPARING:
        loss = PREFERENCE_LOSSES[name]
        expected = loss(THREE, LossOptions())

        def total(chosen, loss=loss):
            return jnp.where(
                spoilt.mask, loss(spoilt._replace(chosen=chosen), LossOptions()), 0
            ).sum()

        np.testing.assert_array_equal(loss(spoilt, LossOptions())[:3], expected)
        gradient = np.asarray(jax.grad(total)(spoilt.chosen))
        assert np.isfinite(gradient).all() and gradient[3] == 0


def test_tokens_past_the_shorter_completion_weigh_alpha():
    """By hand: completions of 2 and 4 tokens of -1 nat each: -2, and -2 - 0.25 · 2."""
    logprobs = np.where(np.arange(5) < np.array([[2], [4]]), -1.0, 0.0)[None]
    weights = ld_weights(np.array([[2, 4]]), 5, 0.25)
    np.testing.assert_array_equal((weights * logprobs).sum(axis=2), [[-2, -2.5]])


def test_the_weights_of_wpo_equal_a_loop_over_the_vocabulary():
    """One token after another in float64: the probability of a token against that of a repeat."""
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    targets = np.array([1, 4, -100, 0, 2, 3])
    collision = linear_collision(*map(np.float32, (hidden, matrix)), targets, chunk_size=4)
    logprobs, repeats = np.zeros(6), np.zeros(6)
    for m in range(6):
        p = np.exp(matrix @ hidden[m]) / np.exp(matrix @ hidden[m]).sum()
        if targets[m] >= 0:
            logprobs[m], repeats[m] = np.log(p[targets[m]]), np.log((p**2).sum())
    np.testing.assert_allclose(collision, repeats, atol=1e-6)
    shape, mask = (1, 2, 3), (targets >= 0).reshape(1, 2, 3)
    found = wpo_weights(np.float32(logprobs).reshape(shape), collision.reshape(shape), mask)
    gaps = (logprobs - repeats).reshape(2, 3)
    np.testing.assert_allclose(found, np.exp(gaps[0].sum() / 2 + gaps[1].mean()), rtol=1e-5)
