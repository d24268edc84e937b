"""Policy losses and advantages against the golden numbers of the formulas, computed apart in numpy.

Padding holds NaN and ±1e4 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import (
    ADVANTAGES,
    LOSS_TYPES,
    RATIOS,
    Clip,
    PolicyOptions,
    clip_fractions,
    gae,
    kl_estimate,
    log_ratios,
    masked_mean,
    masked_whiten,
    policy_loss,
    register_advantage,
    register_loss,
)

X, Y = np.nan, 1e4  # what padding holds
LOGPROBS = np.float32([[-1, -0.5, -2, X], [-0.2, -0.3, -Y, Y], [-1.5, -0.7, -0.1, -0.4]])
OLD = np.float32([[-1.1, -0.9, -1.9, Y], [-0.25, -0.2, X, X], [-1.2, -0.7, -0.5, -0.3]])
REF = np.float32([[-1.2, -0.6, -1.5, -Y], [-0.3, -0.3, Y, X], [-1, -0.9, -0.2, -0.4]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
A = np.float32([1, -0.5, -2])


def loss_of(logprobs, loss_type="dapo", level="token", beta=0.0, estimator="k3", **clip):
    kl = beta * kl_estimate(logprobs, jnp.asarray(REF), MASK, estimator) if beta else None
    return policy_loss(
        logprobs, OLD, A, MASK, loss_type=loss_type, importance_sampling_level=level,
        options=PolicyOptions(Clip(**clip)), kl=kl, max_length=8, key=jax.random.key(0),
    ).loss  # fmt: skip


@pytest.mark.parametrize(
    "expected, options",
    [
        (0.505785, {"loss_type": "grpo"}),
        (0.684597, {"loss_type": "bnpo"}),
        (0.684597, {"loss_type": "dapo"}),
        (0.256724, {"loss_type": "dr_grpo"}),
        (0.448341, {"loss_type": "grpo", "level": "sequence"}),
        (-0.047778, {"loss_type": "cispo_absolute", "high": 0.2}),
        (-0.136087, {"loss_type": "cispo_absolute", "high": 5.0}),
        (0.675708, {"high": 0.28}),
        (0.664191, {"delta": 1.4}),
        (0.686150, {"beta": 0.04}),
    ],
)
def test_losses_equal_the_golden_numbers(expected, options):
    np.testing.assert_allclose(loss_of(jnp.asarray(LOGPROBS), **options), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"loss_type": "dapo"},
            [
                [-0.122797, 0, -0.100537, 0],
                [0.058404, 0.050269, 0, 0],
                [0, 0.222222, 0.331517, 0.201075],
            ],
        ),
        (
            {"loss_type": "grpo", "level": "sequence"},
            [[-0.126959] * 3 + [0], [0.081276] * 2 + [0, 0], [0.166667] * 4],
        ),
    ],
)
def test_gradients_equal_the_golden_numbers(options, expected):
    gradients = jax.grad(lambda x: loss_of(x, **options))(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(gradients, expected, atol=1e-6)


def test_cispo_clips_to_the_papers_interval_and_keeps_every_gradient():
    """By hand: ρ = e^(ℓ - old) clipped to [0.8, 1.2], times Â, over 9 tokens."""
    weights = [[1.105171, 1.2, 0.904837, 0], [1.051271, 0.904837, 0, 0], [0.8, 1, 1.2, 0.904837]]
    expected = -np.float32(weights) * A[:, None] / 9
    gradients = jax.grad(lambda x: loss_of(x, loss_type="cispo"))(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(gradients, expected, atol=1e-6)


def test_the_kl_estimates_equal_the_golden_number_and_the_definitions():
    k3 = kl_estimate(jnp.asarray(LOGPROBS), jnp.asarray(REF), MASK)
    np.testing.assert_allclose(masked_mean(k3, MASK), 0.038824, atol=1e-6)
    delta = [0.2, 0.1, -0.5, 0.1, 0.0, -0.5, 0.2, 0.1, 0.0]  # ℓ - ref of the real tokens
    for estimator, expected in {
        "k1": delta,
        "k2": [d * d / 2 for d in delta],
        "k3": [np.exp(-d) + d - 1 for d in delta],
    }.items():
        found = kl_estimate(jnp.asarray(LOGPROBS), jnp.asarray(REF), MASK, estimator)
        np.testing.assert_allclose(found[MASK], expected, atol=1e-6)
        np.testing.assert_array_equal(found[~MASK], 0)
    with pytest.raises(ValueError, match="'k4'. Known: k1, k2, k3"):
        kl_estimate(jnp.asarray(LOGPROBS), jnp.asarray(REF), MASK, "k4")


def test_every_gradient_is_finite_whatever_the_padding_holds():
    for loss_type in LOSS_TYPES:
        for level in RATIOS:
            gradients = jax.grad(
                lambda x: loss_of(x, loss_type=loss_type, level=level, beta=0.1)  # noqa: B023
            )(jnp.asarray(LOGPROBS))
            assert np.isfinite(gradients).all(), (loss_type, level)
            np.testing.assert_array_equal(gradients[~MASK], 0)


def test_clipping_is_counted_on_the_side_that_loses_its_gradient():
    ratio = RATIOS["token"](log_ratios(LOGPROBS, OLD, MASK), MASK)
    found = clip_fractions(ratio, A, MASK, Clip())
    np.testing.assert_array_equal(np.argwhere(found["low"]), [[2, 0]])
    np.testing.assert_array_equal(np.argwhere(found["high"]), [[0, 1]])
    np.testing.assert_allclose(masked_mean(found["low"], MASK), 1 / 9)


def test_the_weights_make_the_mean_over_micro_batches_that_of_the_whole():
    for loss_type in set(LOSS_TYPES) - {"clip_cov", "kl_cov"}:  # which compare all tokens

        def part(rows):
            return policy_loss(
                jnp.asarray(LOGPROBS[rows]), OLD[rows], A[rows], MASK[rows],
                loss_type=loss_type, max_length=8,  # noqa: B023
            )[:2]  # fmt: skip

        whole, weight = part(slice(None))
        parts = [part(slice(i, i + 1)) for i in range(3)]
        mean = sum(loss * w for loss, w in parts) / sum(w for _, w in parts)
        np.testing.assert_allclose(mean, whole, rtol=1e-6)
        assert sum(w for _, w in parts) == weight


def test_a_loss_of_ones_own_is_registered_from_outside():
    @register_loss("plain", aggregation="sequence_mean")
    def plain(tokens, options):
        return -tokens.ratio * tokens.advantages

    arrays = jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.array([3.0, 1.0]), jnp.ones((2, 1), bool)
    try:
        assert policy_loss(*arrays, loss_type="plain").loss == -2.0
    finally:
        del LOSS_TYPES["plain"]
    with pytest.raises(ValueError, match="unknown loss_type 'plain'. Known: dapo, grpo"):
        policy_loss(*arrays, loss_type="plain")


GROUPS = [[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    "name, rewards, expected",
    [
        ("group", GROUPS, [[0.865875, -0.865875, -0.865875, 0.865875], [0] * 4]),
        ("batch", GROUPS, [[1.322526, -1.322526, -1.322526, 1.322526], [0] * 4]),
        ("none", GROUPS, [[0.5, -0.5, -0.5, 0.5], [0] * 4]),
        ("group", [[1, 0, np.nan, 1]], [[0.577250, -1.154501, 0, 0.577250]]),
        ("rloo", [[1, 0, 0, 1]], [[0.666667, -0.666667, -0.666667, 0.666667]]),
        ("rloo", [[1, np.nan, 0.5]], [[0.5, 0, -0.5]]),
        ("rloo", [[1, np.nan, np.nan]], [[0, 0, 0]]),
        ("group", [[np.nan] * 3], [[0, 0, 0]]),
    ],
)
def test_advantages_equal_the_golden_numbers(name, rewards, expected):
    found = ADVANTAGES[name](jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_an_advantage_of_ones_own_is_registered_from_outside():
    @register_advantage("median")
    def median(rewards):
        return rewards - jnp.nanmedian(rewards, axis=1, keepdims=True)

    assert ADVANTAGES.pop("median")(jnp.array([[0.0, 1.0, 5.0]])).tolist() == [[-1.0, 0.0, 4.0]]


REWARDS = np.float32([[-0.005, -0.01, 0.01, 1, X, X]])
VALUES = np.float32([[0.1, 0.2, 0.3, 0.4, Y, X]])


def test_generalised_advantages_equal_the_golden_numbers():
    """PPO's case: the score after the end of three tokens, and on the last of them."""
    after = np.array([[1, 1, 1, 1, 0, 0]], bool)
    advantages, returns = gae(REWARDS, VALUES, after)
    np.testing.assert_allclose(advantages[0, :4], [0.7942, 0.736, 0.68, 0.6], atol=1e-4)
    np.testing.assert_allclose(returns[0, :4], [0.8942, 0.936, 0.98, 1], atol=1e-4)
    real = np.array([[1, 1, 1, 0, 0, 0]], bool)
    white = masked_whiten(advantages, real)
    np.testing.assert_allclose(white[0, :3], [1.006358, -0.012842, -0.993516], atol=1e-5)

    rewards = REWARDS.copy()
    rewards[0, 2:4] = [1.01, X]
    advantages, returns = gae(rewards, VALUES, real)
    np.testing.assert_allclose(advantages[0, :3], [0.821275, 0.7645, 0.71], atol=1e-6)
    np.testing.assert_allclose(returns[0, :3], [0.921275, 0.9645, 1.01], atol=1e-6)
    white = masked_whiten(advantages, real)
    np.testing.assert_allclose(white[0, :3], [1.006743, -0.013629, -0.993114], atol=1e-5)
    np.testing.assert_array_equal(white[0, 3:], 0)


def test_generalised_advantages_pass_over_observations():
    """As if the masked tokens were not there: a plain recursion over the real ones."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 9)).astype(np.float32)
    mask = rng.random((3, 9)) < 0.6
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    for b in range(3):
        carried_value = carried = 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            delta = rewards[b, t] + 0.9 * carried_value - values[b, t]
            carried = delta + 0.9 * 0.7 * carried
            carried_value = values[b, t]
            np.testing.assert_allclose(advantages[b, t], carried, rtol=1e-5)
            np.testing.assert_allclose(returns[b, t], carried + values[b, t], rtol=1e-5)
        np.testing.assert_array_equal(advantages[b][~mask[b]], 0)
